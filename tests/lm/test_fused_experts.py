"""What stands around the experts' products, run by Triton's interpreter on CPU tensors, against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import in_interpreter, outside, run_interpreted
from torch import nn
from transformers import Qwen3_5MoeTextConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts, Qwen3_5MoeSparseMoeBlock

pytest.importorskip("triton")

WIDTH, EXPERTS, CHOSEN, ROWS = 96, 12, 4, 37


@outside
def test_in_interpreter() -> None:
    run_interpreted(__file__, passed=6)


def made(kind: type[nn.Module], **changes: Any) -> Any:
    """A module of random weights; 96 and 40 wide, neither a power of two."""
    config = Qwen3_5MoeTextConfig(
        hidden_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=CHOSEN, moe_intermediate_size=40,
        shared_expert_intermediate_size=24, **changes,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    module: Any = kind(config)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.3)
    return module.bfloat16().requires_grad_(False)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


@in_interpreter
def test_experts() -> None:
    from qwenscope.lm.fused.experts import agrees, routed

    experts, x = made(Qwen3_5MoeExperts), rows(ROWS, WIDTH)
    weights, chosen = rows(ROWS, EXPERTS).softmax(1).topk(CHOSEN)
    expected = grouped_mm_experts_forward(experts, x, chosen, weights)
    got = routed(experts, x, chosen, weights)
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-3)
    assert (got == expected).float().mean() > 0.99
    assert agrees(experts)


@in_interpreter
def test_experts_of_another_process_add_nothing() -> None:
    """Tokens of theirs are numbered beyond the last expert, and the grouped product leaves their rows as they were."""
    from qwenscope.lm.fused import experts as fused

    experts, x = made(Qwen3_5MoeExperts), rows(ROWS, WIDTH)
    weights, chosen = rows(ROWS, EXPERTS).softmax(1).topk(CHOSEN)
    there = torch.zeros(ROWS, CHOSEN).bernoulli_(0.3, generator=torch.Generator().manual_seed(2)).bool()
    expected = grouped_mm_experts_forward(experts, x, chosen, weights.masked_fill(there, 0))
    grouped = fused._grouped_linear

    def as_a_card_does(x_PD: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        result = grouped(x_PD[: ends[-1]], weight, ends)
        return torch.cat([result, torch.full((len(x_PD) - len(result), result.shape[1]), torch.nan)]).bfloat16()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_grouped_linear", as_a_card_does)
        got = fused.routed(experts, x, chosen.masked_fill(there, EXPERTS), weights.masked_fill(there, 0))
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-3)


@in_interpreter
@pytest.mark.parametrize("shape", [(1, ROWS), (3, 5)])
def test_blocks_with_a_shared_expert(shape: tuple[int, int]) -> None:
    from qwenscope.lm.fused.experts import agrees, block

    module, x = made(Qwen3_5MoeSparseMoeBlock), rows(*shape, WIDTH)
    got, expected = block(module, x), module(x)
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-3)
    assert (got == expected).float().mean() > 0.99
    assert agrees(module)


@in_interpreter
@pytest.mark.parametrize("kind", [Qwen3_5MoeExperts, Qwen3_5MoeSparseMoeBlock])
def test_another_activation_is_not_admitted(kind: type[nn.Module]) -> None:
    from qwenscope.lm.fused.experts import agrees

    assert not agrees(made(kind, hidden_act="gelu"))
