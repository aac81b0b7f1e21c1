"""RMS norms: rows are read once and written once, where plain torch makes float32 copies.

Legend: R rows, D width of the norm.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.func import functional_call

from qwenscope.lm.fused.admission import PROBE_ROWS, agree, is_current, prefer, probe, takes, trains
from qwenscope.lm.fused.rounding import rounded

_BLOCK = 2048
"""Values of one program, eight to a thread."""
_admitted: dict[tuple[type[nn.Module], int], bool] = {}


@triton.jit  # type: ignore[untyped-decorator]
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, gate, weight, normed, rows, stride, d, eps, GATED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """BLOCK_R rows per program, rounded where the modules round: the gated one before its weight, and after it."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < d)[None, :]
    value = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
    value *= tl.rsqrt(tl.sum(value * value, axis=1) / d + eps)[:, None]
    place = row[:, None] * d + column[None, :]
    if GATED:
        value = rounded(rounded(value) * scale)
        opened = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        value *= opened * tl.sigmoid(opened)
    else:
        value *= 1.0 + scale
    tl.store(normed + place, rounded(value).to(tl.bfloat16), mask=inside)


def fuse(model: nn.Module) -> None:
    """Make the classes of the norms on the current GPU choose by rows."""
    for module in model.modules():
        weight, kind = getattr(module, "weight", None), type(module)
        if not (kind.__name__.endswith(("RMSNorm", "RMSNormGated")) and isinstance(weight, Tensor)):
            continue
        if is_current(weight):
            key = kind, len(weight)
            if key not in _admitted:
                _admitted[key] = agrees(module)
            kind.forward = prefer(_forward, kind.forward, _fits)


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """x / rms(x) times 1 + weight, or with a gate times weight and silu(gate): bfloat16 [..., D] -> the same."""
    d = x.shape[-1]
    rows_RD = (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, d)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_d = triton.next_power_of_2(d)
    block_r = max(1, _BLOCK // block_d)
    _norm_kernel[(triton.cdiv(len(rows_RD), block_r),)](
        rows_RD, None if gate is None else gate.contiguous(), weight, normed, len(rows_RD), rows_RD.stride(0), d, eps,
        GATED=gate is not None, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=min(32, max(1, block_r * block_d // 256)),
    )  # fmt: skip
    return normed


def agrees(norm: nn.Module) -> bool:
    """Whether the kernel gives what the norm's class gives, whatever stands in its weight."""
    name, own = type(norm).__name__, norm.weight
    assert isinstance(own, Tensor)
    gates = int(name.endswith("Gated"))

    def compare() -> tuple[Tensor, Tensor, float]:
        weight, *inputs = probe(own, (len(own),), *[(PROBE_ROWS, len(own))] * (1 + gates))
        expected = functional_call(norm, {"weight": weight}, tuple(inputs))
        return expected, rms_norm(inputs[0], weight, _epsilon(norm), *inputs[1:]), 1e-6

    return agree(name, compare)


def _fits(norm: nn.Module, *inputs: Tensor, **named: Any) -> bool:
    gated = type(norm).__name__.endswith("Gated")
    whole = len(inputs) == 1 + gated and not named and all(isinstance(x, Tensor) for x in inputs)
    fit = whole and takes(inputs[0]) and _admitted.get((type(norm), inputs[0].shape[-1]), False)
    return fit and not trains(norm, *inputs[1:])


def _forward(norm: Any, x: Tensor, *gate: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, _epsilon(norm), *gate)


def _epsilon(norm: Any) -> float:
    """As families call it."""
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
