"""Where windows come from: the cache on disk, or a harvest of the next conversations of the corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwenscope.activations.cache import Window, WindowCache
from qwenscope.activations.harvest import harvest
from qwenscope.errors import CorpusError
from qwenscope.lm.model import RowSource
from qwenscope.lm.sites import Site, site_names, sites_of
from qwenscope.parallel.harvest_plan import HarvestPlan
from qwenscope.recipe import Recipe

if TYPE_CHECKING:
    from qwenscope.corpus.stream import CorpusStream


@dataclass(frozen=True)
class Drawn:
    """What training needs of a conversation."""

    id: str
    token_ids: NDArray[np.int32]
    roles: NDArray[np.uint8]


class WindowSource:
    """Makes any window, given where in the corpus it begins. Not for two threads at a time.

    Args:
        lm: Built up to the recipe's last hooked layer.
        stream: Conversations; only this object draws from it. None on all ranks but the first.
        recipe: Its corpus, activations, training and seed.
        plan: Among several ranks, which then make the same calls.

    Raises:
        ResourceError: `activations.cache` is set and its disk cannot hold the run's rows.
    """

    def __init__(self, lm: RowSource, stream: CorpusStream | None, recipe: Recipe, plan: HarvestPlan[Site]) -> None:
        self._lm, self._corpus, self._recipe = lm, stream, recipe
        self._plan, self._group = plan, plan.group
        self._cache: WindowCache | None = None
        self._group.all_gather_object(self._open_cache)

    def start(self) -> dict[str, Any]:
        """Where the stream stands."""
        cursor: dict[str, Any] = self._group.broadcast_object(lambda: self._stream.state())
        return cursor

    def window(self, index: int, cursor: dict[str, Any]) -> Window | None:
        """Window `index`, which begins at `cursor`; None when the corpus is used up.

        Raises:
            CorpusError: the corpus holds no conversation at all.
            FormatError: the cache's files are damaged.
            TrainingError: too many non-finite rows.
        """
        return self._from_cache(index, cursor) or self._harvest(index, cursor)

    def report(self, cursor: dict[str, Any]) -> dict[str, Any]:
        """The corpus report of everything before `cursor`. Rank 0's alone to make."""
        self._move_stream(cursor)
        report: dict[str, Any] = self._stream.report()
        return report

    def _open_cache(self) -> None:
        if (cache := self._recipe.activations.cache) is not None:
            self._cache = WindowCache(cache, self._lm, self._recipe)

    def _from_cache(self, index: int, cursor: dict[str, Any]) -> Window | None:
        """The window as it was written; what one rank finds damaged, or not at all, is so for all of them."""
        if (cache := self._cache) is None:
            return None
        found: list[Window] = []

        def read() -> bool:
            window = cache.read(index, cursor, self._plan.own_sites)
            found.extend([window] if window else [])
            return window is not None

        return found[0] if all(self._group.all_gather_object(read)) else None

    def _harvest(self, index: int, cursor: dict[str, Any]) -> Window | None:
        conversations, next_cursor = self.draw(cursor, self._recipe.activations.window_tokens)
        if not conversations and index == 0:
            raise CorpusError("the corpus holds no conversation; look at corpus.sources and its privacy report")
        if not conversations:
            return None
        recipe = self._recipe
        rows = harvest(
            self._lm,
            conversations,
            sites_of(recipe),
            recipe.activations,
            recipe.corpus.batch_tokens,
            site_names(recipe),
            self._plan,
            # the most that a window holds; of several ranks each has an unlike part of it anyway
            recipe.activations.window_tokens + recipe.corpus.max_length if self._group.size == 1 else 0,
        )
        window = Window(
            harvest=rows,
            conversation_ids=[conversation.id for conversation in conversations],
            tokens=sum(len(conversation.token_ids) for conversation in conversations),
            next_cursor=next_cursor,
        )
        if self._cache is not None:
            self._write(self._cache, index, window, cursor)
        return window

    def _write(self, cache: WindowCache, index: int, window: Window, cursor: dict[str, Any]) -> None:
        """Write each hook point from the first rank that holds it; the manifest only when all have written theirs."""
        rows = {layer: window.harvest.rows[layer] for layer in self._plan.first_sites}
        parts = self._group.all_gather_object(lambda: cache.write_rows(index, rows))
        files = {file: entry for part in parts for file, entry in part.items()}
        self._group.broadcast_object(lambda: cache.finish(index, window, cursor, files))

    def draw(self, cursor: dict[str, Any], least: int) -> tuple[Sequence[Drawn], dict[str, Any]]:
        """Conversations from `cursor` on that hold `least` tokens or more (fewer at the corpus's end), and where the
        next ones begin: read on rank 0, told to the others.
        """
        drawn: list[Drawn] = []

        def read() -> tuple[list[str], list[int], dict[str, Any]]:
            self._move_stream(cursor)
            tokens = 0
            while tokens < least:
                if (conversation := next(self._stream, None)) is None:
                    break
                drawn.append(Drawn(conversation.id, conversation.token_ids, conversation.roles))
                tokens += len(conversation.token_ids)
            return [one.id for one in drawn], [len(one.token_ids) for one in drawn], self._stream.state()

        ids, lengths, next_cursor = self._group.broadcast_object(read)
        if not ids:
            return [], next_cursor
        told = 0 if drawn else sum(lengths)
        token_ids = np.concatenate([np.empty(told, np.int32), *(one.token_ids for one in drawn)])
        roles = np.concatenate([np.empty(told, np.uint8), *(one.roles for one in drawn)])
        self._group.broadcast_(torch.from_numpy(token_ids))
        self._group.broadcast_(torch.from_numpy(roles))
        ends = np.cumsum(lengths, dtype=np.int64)[:-1]
        return list(map(Drawn, ids, np.split(token_ids, ends), np.split(roles, ends))), next_cursor

    @property
    def _stream(self) -> CorpusStream:
        assert self._corpus is not None, "the corpus is rank 0's to read"
        return self._corpus

    def _move_stream(self, cursor: dict[str, Any]) -> None:
        if self._stream.state() != cursor:  # after a restore, or after windows that came from the cache
            self._stream.restore(cursor)
