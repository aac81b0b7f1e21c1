"""Everything that a trainer's next step depends on, as flat named tensors, and back."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from qwenscope.errors import CheckpointError
from qwenscope.sae.selection import PRECISIONS, Precision
from qwenscope.training.active import ActiveLatents
from qwenscope.training.dead_latents import FiringAges, ResamplingPool
from qwenscope.training.guards import check_state
from qwenscope.training.weights import PARAMETERS, Weights

_HOST = {"counters", "generator", "pool.cursor"}
"""What is not copied into a tensor of the trainer's."""


class Stateful(Protocol):
    """What a trainer goes on from."""

    weights: Weights
    active: ActiveLatents
    ages: FiringAges
    pool: ResamplingPool | None
    generator: torch.Generator
    precision: Precision
    candidates_N: Tensor
    centre_D: Tensor
    rms: Tensor
    steps: int
    tokens_trained: int


def tensors(trainer: Stateful) -> dict[str, Tensor]:
    """The trainer's own tensors, not copies, and its counters."""
    weights, pool = trainer.weights, trainer.pool
    counters = [trainer.steps, trainer.tokens_trained, PRECISIONS.index(trainer.precision), weights.eight_bits]
    state = {
        "counters": torch.tensor(counters),
        "generator": trainer.generator.get_state(),
        "ages": trainer.ages.tokens_N,
        "candidates": trainer.candidates_N,
        "centre": trainer.centre_D,
        "rms": trainer.rms,
    }
    for name in PARAMETERS:
        state[name] = weights[name]
        state[f"{name}.mean"] = weights.means[name]
        state[f"{name}.square"] = weights.squares[name]
    if trainer.active.activation.has_threshold:
        state["threshold"] = trainer.active.threshold
    if pool is not None:
        state["pool.rows"] = pool.rows_PD
        state["pool.loss"] = pool.loss_P
        state["pool.cursor"] = torch.tensor(pool.cursor)
    return state


def restore(trainer: Stateful, state: dict[str, Tensor], *, free: bool) -> tuple[Precision, bool]:
    """Copy `state` into the trainer -> the precision that it was trained with, and whether candidates had 8 bits.

    Args:
        free: any precision will do.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has another shape or dtype, or another precision was asked
            for; nothing is copied then.
    """
    own = tensors(trainer)
    check_state(own, state)
    steps, tokens_trained, code, eight_bits = state["counters"].tolist()
    precision = PRECISIONS[code]
    if precision != trainer.precision and not free:
        raise CheckpointError(
            f"trainer state was trained with precision {precision}, the trainer has {trainer.precision}"
        )
    trainer.steps, trainer.tokens_trained = steps, tokens_trained
    trainer.generator.set_state(state["generator"].cpu())
    if trainer.pool is not None:
        trainer.pool.cursor = cast(int, state["pool.cursor"].tolist())  # 0-dim
    for name in own.keys() - _HOST:
        own[name].copy_(state[name])
    return precision, bool(eight_bits)
