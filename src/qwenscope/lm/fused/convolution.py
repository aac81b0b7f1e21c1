"""The short causal convolution before Gated DeltaNet and its activation, which plain torch runs one after the other.

Where causal-conv1d is installed transformers takes its kernel, which is one as well, and nothing is done here.

Legend: B conversations, T tokens, R = B T rows, D channels, W taps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from qwenscope.lm.fused.admission import PROBE_ROWS, ROUNDING, agree, is_current, prefer, probe, takes, trains
from qwenscope.lm.fused.rounding import rounded

_NAME = "causal_conv1d_fn"
"""What modeling files call the function."""
_ACTIVATIONS = (None, "silu", "swish")
_BLOCK_R, _BLOCK_D = 8, 256
_admitted: dict[tuple[str, int], bool] = {}


@triton.jit  # type: ignore[untyped-decorator]
def _convolution_kernel(  # type: ignore[no-untyped-def]
    x, weight, made, rows, stride, length, d,
    WIDTH: tl.constexpr, ACTIVATED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows and BLOCK_D channels per program; what lies before a conversation's first row is 0."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for tap in tl.static_range(WIDTH):
        before = WIDTH - 1 - tap
        there = ((row < rows) & (row % length >= before))[:, None] & inside[None, :]
        value = tl.load(x + (row[:, None] - before) * stride + column[None, :], mask=there, other=0.0).to(tl.float32)
        total += value * tl.load(weight + column * WIDTH + tap, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = rounded(total)
    if ACTIVATED:
        total = rounded(total * tl.sigmoid(total))
    place = row[:, None] * d + column[None, :]
    tl.store(made + place, total.to(tl.bfloat16), mask=(row < rows)[:, None] & inside[None, :])


def fuse(model: nn.Module) -> None:
    """Make the convolution of the files that `model`'s classes stand in choose by rows."""
    if find_spec("causal_conv1d") is not None:
        return
    for module in model.modules():
        weight = getattr(getattr(module, "conv1d", None), "weight", None)
        modeling = sys.modules[type(module).__module__]
        if not (isinstance(weight, Tensor) and is_current(weight) and hasattr(modeling, _NAME)):
            continue
        function = getattr(modeling, _NAME)
        key = modeling.__name__, weight.shape[-1]
        if key not in _admitted:
            _admitted[key] = agrees(function, weight.squeeze(1))
        if _admitted[key]:
            setattr(modeling, _NAME, prefer(convolution, function, _fits))


def convolution(
    hidden_states: Tensor, weight: Tensor, bias: None = None, activation: str | None = None, **_: Any
) -> Tensor:  # fmt: skip
    """Each channel's causal convolution, and its activation: bfloat16 [B, D, T] -> the same, channels next to each
    other in memory, as the rows that follow want them.
    """
    x_BDT, weight_DW = hidden_states, weight  # as transformers names them
    b, d, t = x_BDT.shape
    rows_RD = x_BDT.transpose(1, 2).reshape(-1, d)
    if rows_RD.stride(1) != 1:
        rows_RD = rows_RD.contiguous()
    made = torch.empty(b, t, d, dtype=x_BDT.dtype, device=x_BDT.device)
    _convolution_kernel[(triton.cdiv(b * t, _BLOCK_R), triton.cdiv(d, _BLOCK_D))](
        rows_RD, weight_DW.contiguous(), made, b * t, rows_RD.stride(0), t, d,
        WIDTH=weight_DW.shape[1], ACTIVATED=activation is not None, BLOCK_R=_BLOCK_R, BLOCK_D=_BLOCK_D, num_warps=8,
    )  # fmt: skip
    return made.transpose(1, 2)


def agrees(function: Callable[..., Any], weight_DW: Tensor) -> bool:
    """Whether the kernel gives what the function gives. A sum's last bit may go on through the activation, whose slope
    is at most 1.1: the slack.
    """

    def compare() -> tuple[Tensor, Tensor, Tensor]:
        x_BTD, weight = probe(weight_DW, (2, PROBE_ROWS, len(weight_DW)), tuple(weight_DW.shape))
        x_BDT = x_BTD.transpose(1, 2)
        expected, got = (call(x_BDT, weight, None, activation="silu") for call in (function, convolution))
        plain, sums = (call(x_BDT, weight, None, activation=None).float() for call in (function, convolution))
        size = plain.square().mean().sqrt()
        near = ((sums - plain).abs() <= ROUNDING * plain.abs() + 1e-5 * size).all()
        return expected, got, torch.where(near, 1.1 * ROUNDING * plain.abs() + 1e-5 * size, -torch.inf)

    return agree(_NAME, compare)


def _fits(
    hidden_states: Any, weight: Any, bias: Any = None, *others: Any, activation: Any = None, **named: Any
) -> bool:
    known = activation in _ACTIVATIONS and bias is None and not others
    packed = any(isinstance(value, Tensor) for value in named.values())  # which conversation each token belongs to
    return known and not packed and takes(hidden_states) and takes(weight.detach()) and not trains(weight)
