"""The causal convolution as one kernel, run by Triton's interpreter on CPU tensors, against transformers' own."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from interpreted import in_interpreter, outside, run_interpreted
from torch import Tensor
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

pytest.importorskip("triton")

plain: Any = inspect.unwrap(modeling.causal_conv1d_fn)


@outside
def test_in_interpreter() -> None:
    run_interpreted(__file__, passed=7)


@in_interpreter
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("shape", "beside"), [((3, 19, 96), True), ((1, 5, 300), False)])
def test_values(shape: tuple[int, int, int], activation: str | None, beside: bool) -> None:
    """Channels next to each other in memory, as a projection leaves them, and tokens; both narrower than a block."""
    from qwenscope.lm.fused.convolution import convolution

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).bfloat16().transpose(1, 2)
    weight = torch.randn(shape[2], 4, generator=generator).bfloat16()
    expected = plain(x, weight, None, activation=activation)
    got = convolution(x if beside else x.contiguous(), weight, None, activation=activation)
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=1e-2)
    assert (got == expected).float().mean() > 0.99
    assert got.shape == expected.shape
    assert got.transpose(1, 2).is_contiguous()


def reversed_taps(x: Tensor, weight: Tensor, bias: None, activation: str | None = None) -> Tensor:
    made: Tensor = plain(x, weight.flip(1), bias, activation=activation)
    return made


def another_activation(x: Tensor, weight: Tensor, bias: None, activation: str | None = None) -> Tensor:
    made: Tensor = plain(x, weight, bias, activation=activation and "gelu")
    return made


@in_interpreter
@pytest.mark.parametrize(("function", "same"), [(plain, True), (reversed_taps, False), (another_activation, False)])
def test_admitted_by_its_values(function: Any, same: bool) -> None:
    from qwenscope.lm.fused.convolution import agrees

    assert agrees(function, torch.empty(64, 4).bfloat16()) is same
