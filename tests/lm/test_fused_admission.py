"""Where kernels may not stand in for a part, by Triton's interpreter on CPU tensors that are taken for a card's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted import in_interpreter, outside, run_interpreted
from test_fused_experts import WIDTH, made, rows
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

pytest.importorskip("triton")


@outside
def test_in_interpreter() -> None:
    run_interpreted(__file__, passed=9)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernels were launched; all tensors count as the card's, and classes get their own forwards back."""
    from qwenscope.lm.fused import convolution, experts, norms

    names: list[str] = []
    for part in (norms, experts, convolution):
        monkeypatch.setattr(part, "is_current", lambda x: True)
        monkeypatch.setattr(part, "takes", lambda x: x.dtype == torch.bfloat16 and not x.requires_grad)
        monkeypatch.setattr(part, "_admitted", {})
        for name, kernel in vars(part).copy().items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(part, name, Seen(kernel, names))
    for kind in (modeling.Qwen3_5MoeRMSNorm, modeling.Qwen3_5MoeSparseMoeBlock):
        monkeypatch.setattr(kind, "forward", kind.forward)
    monkeypatch.setattr(modeling, "causal_conv1d_fn", inspect.unwrap(modeling.causal_conv1d_fn))
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", grouped_mm_experts_forward)
    return names


class Seen:
    """A kernel that says its name when it is launched."""

    def __init__(self, kernel: Any, names: list[str]) -> None:
        self.kernel, self.names = kernel, names

    def __getitem__(self, grid: Any) -> Any:
        self.names.append(self.kernel.fn.__name__)
        return self.kernel[grid]


def fused(module: Any, launched: list[str]) -> Any:
    from qwenscope.lm.fused import convolution, experts, norms

    for part in (norms, experts, convolution):
        part.fuse(module)
    launched.clear()
    return module


def block(**changes: Any) -> Any:
    return made(modeling.Qwen3_5MoeSparseMoeBlock, **changes)


@in_interpreter
def test_a_block_is_launched_once_it_is_admitted(launched: list[str]) -> None:
    module = fused(block(), launched)
    module(rows(1, 5, WIDTH))
    assert launched == ["_gate_kernel", "_combine_kernel"]
    module.experts(rows(5, WIDTH), torch.zeros(5, 1, dtype=torch.int64), rows(5, 1))
    assert launched == ["_gate_kernel", "_combine_kernel"] * 2


@in_interpreter
def test_a_block_with_another_activation_is_not_taken_for_its_sibling(launched: list[str]) -> None:
    fused(block(), launched)
    sibling = fused(block(hidden_act="gelu"), launched)
    x = rows(1, 5, WIDTH)
    assert torch.equal(sibling(x), inspect.unwrap(type(sibling).forward)(sibling, x))
    assert not launched


@in_interpreter
@pytest.mark.parametrize("change", ["gate of its own", "float32", "eager"])
def test_experts_of_another_kind_keep_their_own(change: str, launched: list[str]) -> None:
    module = made(modeling.Qwen3_5MoeExperts)
    if change == "gate of its own":
        module.__class__ = type("Clamped", (type(module),), {"_apply_gate": lambda self, x: x.chunk(2, -1)[0]})
    elif change == "float32":
        module = module.float()
    else:
        module.config._experts_implementation = "eager"
    fused(module, launched)
    x = rows(5, WIDTH).to(module.down_proj.dtype)
    module(x, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1, dtype=x.dtype))
    assert not launched


@in_interpreter
def test_hooks_on_experts_are_heard(launched: list[str]) -> None:
    module, heard = fused(block(), launched), []
    module.experts.register_forward_hook(lambda _, inputs, result: heard.append(result) or torch.zeros_like(result))
    x = rows(1, 5, WIDTH)
    assert torch.equal(module(x), inspect.unwrap(type(module).forward)(module, x))
    assert len(heard) == 2


@in_interpreter
def test_gradients_of_weights_are_kept(launched: list[str]) -> None:
    module = nn.ModuleList([block(), modeling.Qwen3_5MoeRMSNorm(WIDTH).bfloat16()])
    fused(module, launched).requires_grad_(True)
    for part in module:
        assert part(rows(1, 5, WIDTH)).requires_grad
    assert not launched
    with torch.no_grad():
        module[1](rows(1, 5, WIDTH))
    assert launched == ["_norm_kernel"]


@in_interpreter
def test_norms_of_rows_that_lie_otherwise(launched: list[str]) -> None:
    norm = fused(modeling.Qwen3_5MoeRMSNorm(WIDTH).bfloat16().requires_grad_(False), launched)
    x = rows(WIDTH, 6).T[None]
    torch.testing.assert_close(norm(x), inspect.unwrap(type(norm).forward)(norm, x), rtol=2**-7, atol=1e-6)
    assert launched


@in_interpreter
def test_convolutions_called_by_names(launched: list[str]) -> None:
    """As Kimi-Linear and OLMo-Hybrid call them."""
    from qwenscope.lm.fused import convolution

    function: Callable[..., Tensor] = modeling.causal_conv1d_fn
    weight = rows(WIDTH, 4)
    convolution._admitted[modeling.__name__, 4] = convolution.agrees(function, weight)
    launched.clear()
    either = convolution.prefer(convolution.convolution, function, convolution._fits)
    x = rows(2, 7, WIDTH).transpose(1, 2)
    got = either(hidden_states=x, weight=weight, bias=None, activation="silu")
    torch.testing.assert_close(got, function(x, weight, None, "silu"), rtol=2**-6, atol=1e-2)
    assert launched == ["_convolution_kernel"]
