"""Where a kernel may stand in for a part of a model, and whether it gives what the part gives."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwenscope.errors import reason

logger = logging.getLogger(__name__)

ROUNDING = 2.0**-7
"""One step of bfloat16, relative to the value."""
PROBE_ROWS = 64


def is_current(x: Tensor) -> bool:
    """On the GPU that kernels are launched on: a model over several has layers on others."""
    return x.is_cuda and x.device.index == torch.cuda.current_device()


def takes(x: Any) -> bool:
    """Whether rows may go to a kernel: bfloat16, no gradient wanted, on the current GPU."""
    return isinstance(x, Tensor) and is_current(x) and x.dtype == torch.bfloat16 and not x.requires_grad


def probe(like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random bfloat16 tensors where `like` is, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16().to(like.device) for shape in shapes]


@torch.no_grad()
def agree(name: str, compare: Callable[[], tuple[Tensor, Tensor, Tensor | float]]) -> bool:
    """Whether what `compare` returns, a part's own values, the kernel's and a slack, agree to one rounding and that."""
    try:
        expected, got, slack = compare()
        return bool(((got.float() - expected.float()).abs() <= ROUNDING * expected.float().abs() + slack).all())
    except Exception as error:  # another version's module, a compiler that is not there: the part stays as it is
        logger.info("%s is not fused: %s", name, reason(error))
        return False


def prefer(kernel: Callable[..., Any], plain: Callable[..., Any], fits: Callable[..., bool]) -> Callable[..., Any]:
    """`plain`, which asks at each call whether `fits` lets the kernel do it (once; idempotent)."""
    if plain.__module__ == __name__:
        return plain

    @functools.wraps(plain)
    def choose(*inputs: Any, **named: Any) -> Any:
        return (kernel if fits(*inputs, **named) else plain)(*inputs, **named)

    choose.__module__ = __name__
    return choose
