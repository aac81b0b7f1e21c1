"""Language-model batches: one conversation per row, similar lengths together, right-padded, under a token budget.

Right padding needs no attention mask: causal attention and the recurrent layers alike never look right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qwenscope.errors import CorpusError


@dataclass(frozen=True)
class Batch:
    """C conversations, T positions of the longest."""

    input_ids_CT: torch.Tensor
    """int64, right-padded."""
    lengths_C: list[int]
    members: list[int]
    """Positions in the list of conversations that was batched."""


def make_batches(
    lengths: Sequence[int], token_ids: Sequence[NDArray[np.int32]], budget: int, pad_id: int
) -> list[Batch]:
    """Cut conversations, sorted by length, into batches of at most `budget` tokens with padding.

    Args:
        lengths: tokens per conversation, each at least 1.
        token_ids: one array [T] per conversation.
        budget: upper bound of C x T of any batch.
        pad_id: fills up the rows; its value never reaches a kept position.

    Returns:
        Batches, longest first (so that memory peaks at once); every conversation is in exactly one. The same lengths give the
        same batches: ties keep their order.

    Raises:
        CorpusError: a conversation is longer than the budget.
    """
    return [_batch(members, token_ids, pad_id) for members in cut(lengths, budget)]


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The members of each batch that `make_batches` makes.

    Raises:
        CorpusError: a conversation is longer than the budget.
    """
    order = sorted(range(len(lengths)), key=lambda member: (-lengths[member], member))
    if order and lengths[order[0]] > budget:
        raise CorpusError(
            f"a conversation of {lengths[order[0]]} tokens exceeds the budget of {budget}; raise corpus.batch_tokens"
        )
    batches = []
    start = 0
    while start < len(order):
        rows = budget // lengths[order[start]]
        batches.append(order[start : start + rows])
        start += rows
    return batches


def _batch(members: list[int], token_ids: Sequence[NDArray[np.int32]], pad_id: int) -> Batch:
    rows = [token_ids[member] for member in members]
    lengths = [len(row) for row in rows]
    padded_CT = np.full((len(rows), max(lengths)), pad_id, dtype=np.int64)
    for padded_T, row in zip(padded_CT, rows, strict=True):
        padded_T[: len(row)] = row
    return Batch(torch.from_numpy(padded_CT), lengths, members)
