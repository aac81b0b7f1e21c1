"""Windows: every kept token exactly once, shuffled, and resumable from a few numbers.

Window i is the next conversations of the stream until they hold at least `activations.window_tokens` tokens; its rows
are visited in the order `randperm(R)` of a generator seeded by (seed, "window", i), the same at every hook point. So a
window is a pure function of (recipe, seed, i) and of where the stream stood when it began: a resumed run harvests that
one window again and goes on in its middle. A batch that a window cannot fill continues in the next one.

While a window is consumed the next one is harvested in another thread, if the run will want rows of it: an order of
events, without any effect on the rows. `state` speaks of what was handed out, never of what was made in advance.

Of several ranks, rank 0 reads the corpus and tells the others the token ids; all harvest, and each holds the rows of
the hook points that it owns, the same as one process would hold.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwenscope.activations.cache import Window
from qwenscope.activations.harvest import LEFT_OUT
from qwenscope.activations.prefetch import Prefetcher
from qwenscope.activations.source import Drawn, WindowSource
from qwenscope.errors import CheckpointError, CorpusError, RecipeError
from qwenscope.lm.model import RowSource
from qwenscope.lm.sites import Site, sites_of
from qwenscope.parallel.harvest_plan import HarvestPlan
from qwenscope.recipe import Recipe
from qwenscope.seeds import generator

if TYPE_CHECKING:
    from qwenscope.corpus.stream import CorpusStream


class Windows:
    """Training batches: the same tokens at every hook point, each kept token once.

    Holds one window, and with `activations.overlap` the next one (36.9 KB each per token for nine hook points of the
    published model). `close` it: a harvest may be under way.
    """

    def __init__(
        self, lm: RowSource, stream: CorpusStream | None, recipe: Recipe, plan: HarvestPlan[Site] | None = None
    ) -> None:
        """
        Args:
            lm: Built up to the recipe's last hooked layer. With `activations.overlap` another thread runs it.
            stream: Conversations; until `close` only this object draws from it. None on all ranks but the first.
            recipe: Its corpus, activations, training and seed.
            plan: Among several ranks, which then make the same calls; None is one process alone.

        Raises:
            RecipeError: `training.batch_size` exceeds `activations.window_tokens`.
            ResourceError: `activations.cache` is set and its disk cannot hold the run's rows.
        """
        self._lm = lm
        self._recipe = recipe
        plan = plan or HarvestPlan.alone(sites_of(recipe))
        self._layers = plan.own_sites
        self._check_size(recipe.training.batch_size)
        self._prefetcher: Prefetcher | None = None
        if recipe.activations.overlap and not plan.in_turn:
            self._prefetcher = Prefetcher(lm.device)
            plan = dataclasses.replace(plan, group=plan.group.clone(rows=True))
        self._source = WindowSource(lm, stream, recipe, plan)
        self._index = 0  # the window that the next row comes from
        self._offset = 0  # its rows already handed out
        self._cursor = self._source.start()  # where it begins
        self._before = dict.fromkeys(("tokens_read", *LEFT_OUT), 0)  # counts of all windows before it
        self._window: Window | None = None  # None: not harvested yet
        self._order_R = torch.empty(0, dtype=torch.int64)  # of its rows, on the CPU
        self._places_R = self._order_R  # the same where the rows are: one copy a window, none a batch
        self._expected: str | None = None  # digest of the window that a restored state was in
        self._last: list[tuple[list[str], Tensor, Tensor]] = []  # ids, conversation_B, position_B per part of the batch

    def next_batch(self, size: int) -> dict[Site, Tensor]:
        """The next `size` rows at every own hook point: {layer: x_BD} in the language model's dtype, on its device.

        Fewer rows, in the end none, only when the corpus is used up; `batch_rows` says how many.

        Raises:
            RecipeError: `size` exceeds `activations.window_tokens`.
            CorpusError: the corpus holds no conversation at all.
            TrainingError: too many non-finite rows.
        """
        self._check_size(size)
        self._last = []
        parts: list[dict[Site, Tensor]] = []
        while (missing := size - self.batch_rows) and (part := self._take(missing)) is not None:
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        lm = self._lm
        nothing = {site: torch.empty(0, lm.width(site), dtype=lm.dtype, device=lm.device) for site in self._layers}
        return {site: torch.cat([nothing[site], *(part[site] for part in parts)]) for site in self._layers}

    @property
    def batch_rows(self) -> int:
        """Rows of the last batch, also where this rank owns no hook point."""
        return sum(len(position_B) for _, _, position_B in self._last)

    def calibration_rows(self) -> dict[Site, Tensor]:
        """The first `training.calibration_tokens` rows of window 0 (all of it if it has fewer), in training order.

        They are handed out again by `next_batch`. A resumed run takes its calibration from the checkpoint instead.
        """
        assert self._index == 0, "calibration rows are asked for before training begins"
        window = self._current()
        assert window is not None, "an empty corpus is refused"
        return self._gather(window, slice(self._recipe.training.calibration_tokens))

    def conversations(self, least: int) -> Sequence[Drawn]:
        """The corpus's next conversations, whole, that hold at least so many tokens; none when it is used up.

        They follow the last window that rows were taken from, whose other rows are given up. Their tokens count as
        read; `leave_out` says which of them were left out.
        """
        if self._offset and (window := self._current()) is not None:  # after a restore it is harvested once more
            self._leave(window)
        self._window = None
        if self._prefetcher is not None:
            self._prefetcher.drop()
        drawn, self._cursor = self._source.draw(self._cursor, least)
        self._before["tokens_read"] += sum(len(one.token_ids) for one in drawn)
        return drawn

    def leave_out(self, left_out: Mapping[str, int]) -> None:
        """Count tokens of the last `conversations` that were left out, by reason."""
        for reason, tokens in left_out.items():
            self._before[reason] += tokens

    def last_tokens(self) -> list[tuple[str, int]]:
        """(conversation id, position) of each row of the last batch."""
        return [
            (ids[c], position)
            for ids, conversation_B, position_B in self._last
            for c, position in zip(conversation_B.tolist(), position_B.tolist(), strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """Where the next batch begins, as JSON-able values."""
        inside = self._window is not None and self._offset > 0
        return {
            "window": self._index,
            "offset": self._offset,
            "cursor": self._cursor,
            "counts": dict(self._before),
            "conversations": _digest(self._window) if inside and self._window else self._expected,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; the next batch harvests that one window again.

        The next batch raises CheckpointError if the corpus gives other conversations than it did then.
        """
        self._index, self._offset = int(state["window"]), int(state["offset"])
        self._cursor, self._before = state["cursor"], dict.fromkeys(LEFT_OUT, 0) | state["counts"]
        self._expected = state["conversations"]
        self._window = None
        if self._prefetcher is not None:
            self._prefetcher.drop()

    @property
    def left_out(self) -> dict[str, int]:
        """Tokens left out by reason (see LEFT_OUT), the current window's included."""
        now = {} if self._window is None else self._window.harvest.left_out
        return {reason: self._before[reason] + now.get(reason, 0) for reason in LEFT_OUT}

    @property
    def tokens_read(self) -> int:
        """Tokens of all conversations harvested so far, left out or kept, the current window's included."""
        return self._before["tokens_read"] + (0 if self._window is None else self._window.tokens)

    def report(self) -> dict[str, Any]:
        """The corpus report of all windows so far, also where they came from the cache. Rank 0's alone to make."""
        if self._prefetcher is not None:
            self._prefetcher.settle()  # the corpus is read by one thread at a time
        return self._source.report(self._cursor if self._window is None else self._window.next_cursor)

    def close(self) -> None:
        """Wait for a harvest under way, drop it, and end its thread; `state` and `report` stay valid."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def _current(self) -> Window | None:
        """The window that the next row comes from; None when the corpus is used up."""
        while self._window is None:
            window = self._next()
            if window is None:
                return None
            kept = len(window.harvest.position_R)
            if self._expected not in (None, _digest(window)) or self._offset > kept:
                raise CheckpointError(
                    f"window {self._index} holds other conversations than when this run was saved: "
                    "corpus.sources changed; restore them or start a new run"
                )
            if not kept and self._index == 0:
                raise CorpusError(
                    "no row of the first window was kept; look at activations.skip_roles, activations.outlier_factor "
                    "and the model"
                )
            self._expected = None
            self._order_R = torch.randperm(kept, generator=generator(self._recipe.seed, "window", self._index))
            self._places_R = self._order_R.to(self._lm.device, non_blocking=True)
            self._window = window
            if self._offset == kept:
                self._leave(window)
            else:
                self._look_ahead(window)
        return self._window

    def _next(self) -> Window | None:
        """Window `self._index`, made now or in advance; None when the corpus is used up."""
        make = partial(self._source.window, self._index, self._cursor)
        if self._prefetcher is None:
            return make()
        if not self._prefetcher.begun:
            self._prefetcher.begin(make)
        return self._prefetcher.take()

    def _look_ahead(self, window: Window) -> None:
        """Begin the window behind the current one if the run will want rows of it; every rank decides alike."""
        handed_out = self._before["tokens_read"] - sum(self._before[reason] for reason in LEFT_OUT)  # before this one
        if self._prefetcher is not None and handed_out + len(self._order_R) < self._recipe.training.shuffled_tokens:
            self._prefetcher.begin(partial(self._source.window, self._index + 1, window.next_cursor))

    def _take(self, most: int) -> dict[Site, Tensor] | None:
        """Up to `most` further rows, all of one window, which is let go with its last row; None at the corpus's end."""
        window = self._current()
        if window is None:
            return None
        part = slice(self._offset, self._offset + most)
        index, kept = self._order_R[part], window.harvest
        rows = self._gather(window, part)
        self._offset += len(index)
        self._last.append((window.conversation_ids, kept.conversation_R[index], kept.position_R[index]))
        if self._offset == len(self._order_R):
            self._leave(window)
        return rows

    def _gather(self, window: Window, part: slice) -> dict[Site, Tensor]:
        """Rows of a part of the order, at every own hook point."""
        return {site: rows_RD[self._places_R[part]] for site, rows_RD in window.harvest.rows.items()}

    def _leave(self, window: Window) -> None:
        self.leave_out(window.harvest.left_out)
        self._before["tokens_read"] += window.tokens
        self._cursor = window.next_cursor
        self._index += 1
        self._offset = 0
        self._window = None

    def _check_size(self, size: int) -> None:
        if size > (limit := self._recipe.activations.window_tokens):
            raise RecipeError(f"training.batch_size {size} exceeds activations.window_tokens {limit}; raise the latter")


def _digest(window: Window) -> str:
    """Of its conversations: a resumed run must meet the same ones."""
    return hashlib.sha256("\n".join(window.conversation_ids).encode()).hexdigest()[:16]
