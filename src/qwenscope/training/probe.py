"""A fingerprint of the language model in action: does a resumed run see the residual stream that it was begun with?

A file hash would not do: other kernels, libraries or hardware change the rows as other weights do. A few norms tell a
different model (refused) from different rounding (said aloud: the run goes on, but not to the same bits).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from qwenscope.errors import CheckpointError, ModelError
from qwenscope.lm.model import RowSource
from qwenscope.lm.sites import Site
from qwenscope.machine import memory_errors_named

logger = logging.getLogger(__name__)

_POSITIONS = 16
_OTHER_MODEL = 0.05  # relative difference of norms that no rounding makes, bfloat16 included


def probe(lm: RowSource, sites: Sequence[Site]) -> dict[str, list[float]]:
    """{site: norms of the first 16 positions} of a fixed row of token ids; JSON keeps the values exactly."""
    ids_CT = torch.arange(_POSITIONS).remainder(len(lm.tokenizer)).unsqueeze(0)
    streams = lm.streams(ids_CT, [_POSITIONS], sites)
    names = {site: site.name if site.within else str(site.layer) for site in sites}  # as older checkpoints have them
    return {names[site]: x_CTD[0].double().norm(dim=-1).tolist() for site, x_CTD in streams.items()}


def warm_up(lm: RowSource, sites: Sequence[Site], rows: int, length: int) -> None:
    """On a GPU, one batch as large as the run's: kernels that tune themselves at first sight (flash-linear-attention's)
    keep what suits such batches, and not the probe's short row, which then shows whether they chose as before.

    Raises:
        ResourceError: a batch does not fit.
    """
    if lm.device.type == "cuda":
        with memory_errors_named(f"a batch of {rows * length:,} tokens", "lower corpus.batch_tokens"):
            lm.streams(torch.zeros(rows, length, dtype=torch.int64), [length] * rows, sites)


def check_probe(saved: Any, now: dict[str, list[float]]) -> str | None:
    """None if both are equal to the bit, else a sentence to tell the user.

    Raises:
        CheckpointError: they differ by more than rounding does.
    """
    if saved == now:
        return None
    worst = _distance(saved, now)
    if not worst <= _OTHER_MODEL:
        raise CheckpointError(
            f"the language model's residual stream differs from this run's by {worst:.2g} (relative); "
            "lm.model holds other weights than when the run began: restore them, or start a new run"
        )
    return (
        f"the language model rounds differently here than where this run was saved (by {worst:.1g}): it goes on, "
        "but not to the same bits as without the interruption"
    )


def check_ranks(probes: Sequence[dict[str, list[float]]]) -> str | None:
    """None if all ranks' probes are equal to the bit, else a sentence to tell the user.

    Raises:
        ModelError: one differs from rank 0's by more than rounding does.
    """
    unlike = [rank for rank, other in enumerate(probes) if other != probes[0]]
    for rank in unlike:
        if not (worst := _distance(probes[0], probes[rank])) <= _OTHER_MODEL:
            raise ModelError(
                f"the language model's residual stream on rank {rank} differs from rank 0's by {worst:.2g} (relative); "
                "lm.model holds other weights there: give all machines the same"
            )
    if not unlike:
        return None
    return (
        f"the language model rounds differently on ranks {unlike} than on rank 0: the bits of the result depend on "
        "which rank harvests what"
    )


def _distance(first: dict[str, list[float]], second: dict[str, list[float]]) -> float:
    """Largest relative difference of two probes' norms."""
    return max(
        abs(a - b) / max(abs(a), 1e-30) for layer in first for a, b in zip(first[layer], second[layer], strict=True)
    )
