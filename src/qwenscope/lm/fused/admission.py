"""Where a kernel may stand in for a part of a model, and whether it gives what the part gives."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


def trains(*parts: nn.Module | Tensor) -> bool:
    """Whether a gradient would be wanted of one of `parts`: kernels have none."""
    weights = (w for part in parts for w in (part.parameters() if isinstance(part, nn.Module) else (part,)))
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)


@torch.no_grad()
def agree(name: str, compare: Callable[[], tuple[Tensor, Tensor, Tensor | float]]) -> bool:
    """Whether what `compare` returns, a part's own values, the kernel's and a slack, agree to that and two roundings: a
    value's own, and one of what it was made from, which a card's exponential may turn the other way.
    """
    try:
        expected, got, slack = compare()
        near = (got.float() - expected.float()).abs() <= 2 * ROUNDING * expected.float().abs() + slack
        if not (same := bool(near.all())):
            logger.info("%s is not fused: %.2g of its values differ", name, 1 - float(near.float().mean()))
        return same
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
