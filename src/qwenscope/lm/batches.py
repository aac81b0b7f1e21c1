"""Language-model batches: one conversation per row, similar lengths together, right-padded, under a token budget.

Right padding needs no attention mask: neither causal attention nor the recurrent layers ever look right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qwenscope.errors import CorpusError

BATCH_OVERHEAD, GPU_OVERHEAD = 512, 2048
"""What one more batch costs, in tokens. 512 gives batches of about 10,000 tokens of real conversations with under 4 %
padding, where filling every batch to the brim gives 14-17 %. A GPU reads nearly all of a mixture's experts for each
batch, whatever its size: 1,200 to 2,500 tokens by the roofline of an H200."""
_WINDOW_PARTS = 256
"""On a GPU the overhead is this part of a window's tokens, within the two: windows of 524,288 tokens get all of it, and
smaller ones keep enough batches for several GPUs to share."""


@dataclass(frozen=True)
class Batch:
    """C conversations, T positions of the longest."""

    input_ids_CT: torch.Tensor
    """int64, right-padded."""
    lengths_C: list[int]
    members: list[int]
    """Positions in the list of conversations that was batched."""


def make_batches(
    lengths: Sequence[int], token_ids: Sequence[NDArray[np.int32]], budget: int, pad_id: int, device: torch.device
) -> list[Batch]:
    """Cut conversations into batches of at most `budget` tokens, padding included.

    Args:
        lengths: tokens per conversation, each at least 1.
        token_ids: one array [T] per conversation.
        budget: upper bound of C x T of any batch.
        pad_id: fills up the rows; its value never reaches a kept position.
        device: where the language model stands; its type alone counts.

    Returns:
        Batches, longest conversations first; every conversation is in exactly one. The same lengths give the same
        batches on devices of one type.

    Raises:
        CorpusError: a conversation is longer than the budget.
    """
    return [_batch(members, token_ids, pad_id) for members in cut(lengths, budget, device)]


def overhead(tokens: int, device: torch.device) -> int:
    """What one more batch of a window of so many tokens costs, in tokens."""
    if device.type != "cuda":
        return BATCH_OVERHEAD
    return min(GPU_OVERHEAD, max(BATCH_OVERHEAD, tokens // _WINDOW_PARTS))


def cut(lengths: Sequence[int], budget: int, device: torch.device) -> list[list[int]]:
    """The members of each batch: of all ways to cut the conversations, sorted by length, the one with the least
    padding + overhead of each batch (dynamic programming over the cuts, in integers).

    Raises:
        CorpusError: a conversation is longer than the budget.
    """
    order = sorted(range(len(lengths)), key=lambda member: (-lengths[member], member))
    if order and lengths[order[0]] > budget:
        raise CorpusError(
            f"a conversation of {lengths[order[0]]} tokens exceeds the budget of {budget}; raise corpus.batch_tokens"
        )
    count, each = len(order), overhead(sum(lengths), device)
    cost = np.full(count + 1, np.iinfo(np.int64).max)  # of the best cut of the first i
    cost[0] = 0
    start = np.zeros(count + 1, dtype=np.int64)  # where that cut's last batch begins
    for i, member in enumerate(order):
        longest = lengths[member]
        rows = np.arange(1, min(count - i, budget // longest) + 1)
        ends, with_batch = i + rows, cost[i] + rows * longest + each
        better = ends[with_batch < cost[ends]]
        cost[better] = with_batch[better - i - 1]
        start[better] = i
    batches = []
    end = count
    while end:
        batches.append(order[start[end] : end])
        end = int(start[end])
    return batches[::-1]


def _batch(members: list[int], token_ids: Sequence[NDArray[np.int32]], pad_id: int) -> Batch:
    rows = [token_ids[member] for member in members]
    lengths = [len(row) for row in rows]
    padded_CT = np.full((len(rows), max(lengths)), pad_id, dtype=np.int64)
    for padded_T, row in zip(padded_CT, rows, strict=True):
        padded_T[: len(row)] = row
    return Batch(torch.from_numpy(padded_CT), lengths, members)
