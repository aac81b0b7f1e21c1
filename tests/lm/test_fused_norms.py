"""Norms as one kernel, run by Triton's interpreter on CPU tensors, against transformers' own."""

from __future__ import annotations

import pytest
import torch
from interpreted import in_interpreter, outside, run_interpreted
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNorm, Qwen3_5MoeRMSNormGated

pytest.importorskip("triton")


@outside
def test_in_interpreter() -> None:
    run_interpreted(__file__, passed=9)


@in_interpreter
@pytest.mark.parametrize(("width", "rows"), [(2048, 3), (256, 19), (96, 50)])
@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_values(width: int, rows: int, gated: bool) -> None:
    """Rows that are strided views, as halves of a projection are."""
    from qwenscope.lm.fused.norms import rms_norm

    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, rows, 2 * width, generator=generator).mul(5).bfloat16()[..., :width]
    gate = torch.randn(2, rows, width, generator=generator).bfloat16()
    norm = (Qwen3_5MoeRMSNormGated if gated else Qwen3_5MoeRMSNorm)(width, eps=1e-3).bfloat16()
    norm.weight.copy_(torch.randn(width, generator=generator))
    expected = norm(x, gate) if gated else norm(x)
    got = rms_norm(x, norm.weight, 1e-3, *[gate] * gated)
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6)
    assert (got == expected).float().mean() > 0.99


@in_interpreter
@pytest.mark.parametrize(
    ("norm", "same"), [(Qwen3_5MoeRMSNorm, True), (Qwen3_5MoeRMSNormGated, True), (LlamaRMSNorm, False)]
)
def test_a_class_is_admitted_by_its_values(norm: type[nn.Module], same: bool) -> None:
    """Llama's weight is the factor itself, which a norm fresh from its constructor would not tell apart from 1 + 0."""
    from qwenscope.lm.fused.norms import agrees

    assert agrees(norm(64).bfloat16()) is same
