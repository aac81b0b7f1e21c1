"""One order for the rows of several files: each file is spread evenly over the whole.

Files of one folder may be unlike, chat in one and tool use in the next. Read one after another, an SAE would meet them
one after another too, and a short run only the first.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from typing import Any, Final

from qwenscope.corpus.shards import CHUNK_ROWS, Columns, Rows, Shard, count_rows, read_shard
from qwenscope.seeds import derive_seed

MIXED_SHARDS = 16
"""Files that are open and mixed at a time; a folder of more is read in groups of so many."""

_BLANK: Final = object()


def read_mixed(shards: Sequence[Shard], row: int, columns: Columns, seed: int, where: str) -> Iterator[Rows]:
    """Rows of all `shards` in their mixed order from index `row` on, in chunks of at most CHUNK_ROWS.

    Args:
        shards: files with the same columns; one alone is read as it is.
        row: index in the mixed order of the first row wanted.
        columns: what is read.
        seed: governs the mixing and each parquet file's row groups.
        where: the source in words, for errors.

    Raises:
        CorpusError: a file is unreadable, truncated, or without any of the columns; names it.
    """
    seeds = [derive_seed(seed, "row groups", shard.name) for shard in shards]
    if len(shards) == 1:
        yield from read_shard(shards[0], row, columns, seeds[0], where)
        return
    counts = [count_rows(shard, where) for shard in shards]
    order = mixed_order(counts, derive_seed(seed, "mixing", shards[0].name))
    starts = [0] * len(shards)
    for number in islice(order, row):
        starts[number] += 1
    with ExitStack() as closing_all:
        slots = [
            closing_all.enter_context(closing(_slots(read_shard(shard, start, columns, own, where), start, count)))
            for shard, start, own, count in zip(shards, starts, seeds, counts, strict=True)
        ]
        numbered = ((index, next(slots[number])) for index, number in enumerate(order, start=row))
        kept = ((index, item) for index, item in numbered if item is not _BLANK)
        while rows := list(islice(kept, CHUNK_ROWS)):
            yield rows


def mixed_order(counts: Sequence[int], seed: int) -> Iterator[int]:
    """Which file gives the next row, until all are used up.

    Row j of a file with n rows stands at (j + u) / n of the way, u in [0, 1) drawn per file: at any share of the way
    each file has given that share of its rows, to within one.

    Examples:
        >>> list(mixed_order([3, 0, 1], seed=1))
        [0, 0, 0, 2]
    """
    draw = random.Random(seed)
    offsets = [draw.random() for _ in counts]
    heap = [(offsets[number] / count, number, 0) for number, count in enumerate(counts) if count]
    heapq.heapify(heap)
    while heap:
        _, number, row = heap[0]
        yield number
        if row + 1 < counts[number]:
            heapq.heapreplace(heap, ((row + 1 + offsets[number]) / counts[number], number, row + 1))
        else:
            heapq.heappop(heap)


def _slots(chunks: Iterator[Rows], start: int, count: int) -> Generator[Any, None, None]:
    """One item per row index from `start` to `count`; `_BLANK` for those that the reader skips."""
    at = start
    for rows in chunks:
        for index, item in rows:
            yield from [_BLANK] * (index - at)
            yield item
            at = index + 1
    yield from [_BLANK] * (count - at)
