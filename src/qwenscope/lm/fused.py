"""Norms of a language model as one Triton kernel each on CUDA, which reads rows once and writes them once; in plain
torch each is about ten operators, most of them over float32 copies.

A class of norms is admitted once its own forward and the kernel agree on random rows and weights; others, other
dtypes, CPUs, and rows that need a gradient keep what they have.

Legend: R rows, D width of the norm.
"""

from __future__ import annotations

import functools
import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qwenscope.errors import reason

if find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _rounded(value):  # type: ignore[no-untyped-def]
        """float32 to the nearest bfloat16, ties to even, as a float32: Triton's interpreter would cut bits off."""
        bits = value.to(tl.int32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        return tl.where(value == value, near, value)  # bits of what is no number may run over

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
            value = _rounded(_rounded(value) * scale)
            opened = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
            value *= opened * tl.sigmoid(opened)
        else:
            value *= 1.0 + scale
        tl.store(normed + place, _rounded(value).to(tl.bfloat16), mask=inside)


logger = logging.getLogger(__name__)

_BLOCK = 2048
"""Values of one program, eight to a thread."""
_ROUNDING = 2.0**-7
"""One step of bfloat16, relative to the value."""
_PROBE_ROWS = 64
_admitted: dict[tuple[type[nn.Module], int], bool] = {}


def fuse_norms(model: nn.Module) -> None:
    """Make the norms of `model` that stand on the current GPU run as one kernel, where its values are theirs."""
    if find_spec("triton") is None:
        return
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not (type(module).__name__.endswith(("RMSNorm", "RMSNormGated")) and isinstance(weight, Tensor)):
            continue
        if _is_current(weight):
            key = type(module), len(weight)
            if key not in _admitted:
                _admitted[key] = agrees(module)
            _choose_by_rows(type(module))


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """x / rms(x) times 1 + weight, or with a gate times weight and silu(gate): bfloat16 [..., D] -> the same."""
    d = x.shape[-1]
    rows_RD, normed = x.reshape(-1, d), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_d = triton.next_power_of_2(d)
    block_r = max(1, _BLOCK // block_d)
    _norm_kernel[(triton.cdiv(len(rows_RD), block_r),)](
        rows_RD, None if gate is None else gate.contiguous(), weight, normed, len(rows_RD), rows_RD.stride(0), d, eps,
        GATED=gate is not None, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=max(1, block_r * block_d // 256),
    )  # fmt: skip
    return normed


@torch.no_grad()
def agrees(norm: nn.Module) -> bool:
    """Whether the kernel gives what the norm's class gives, to one rounding, whatever stands in its weight."""
    name, own = type(norm).__name__, norm.weight
    assert isinstance(own, Tensor)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(own.device)

    weight = random(len(own))
    inputs = [random(_PROBE_ROWS, len(own)) for _ in range(1 + name.endswith("Gated"))]
    try:
        expected = functional_call(norm, {"weight": weight}, tuple(inputs)).float()
        got = rms_norm(inputs[0], weight, _epsilon(norm), *inputs[1:]).float()
        return bool(((got - expected).abs() <= _ROUNDING * expected.abs() + 1e-6).all())
    except Exception as error:  # another version's module, a compiler that is not there: the norm stays as it is
        logger.info("%s is not fused: %s", name, reason(error))
        return False


def _choose_by_rows(norm: type[nn.Module]) -> None:
    """Make the class choose at each call (once; idempotent)."""
    plain: Any = norm.forward
    if hasattr(plain, "__wrapped__") and plain.__module__ == __name__:
        return

    @functools.wraps(plain)
    def forward(self: Any, *inputs: Tensor, **named: Any) -> Tensor:
        if inputs and not named and _fits(inputs[0]) and _admitted.get((type(self), inputs[0].shape[-1])):
            return rms_norm(inputs[0], self.weight, _epsilon(self), *inputs[1:])
        normed: Tensor = plain(self, *inputs, **named)
        return normed

    forward.__module__ = __name__
    norm.forward = forward


def _fits(x: Tensor) -> bool:
    return _is_current(x) and x.dtype == torch.bfloat16 and not x.requires_grad


def _is_current(x: Tensor) -> bool:
    """On the GPU that kernels are launched on: a model over several has layers on others."""
    return x.is_cuda and x.device.index == torch.cuda.current_device()


def _epsilon(norm: Any) -> float:
    """As families call it."""
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
