"""One source's conversations in order, prepared here or ahead in worker processes, with an exact cursor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.prepare import Outcome, Preparer
from qwenscope.corpus.sources import Chunk, Source
from qwenscope.corpus.workers import prepare_in_worker
from qwenscope.errors import CorpusError

_MOST_REFUSED = 1_000
"""Rows of an endless source that may be left out one after another: a finite one ends by itself."""
_MOST_REASONS = 100
"""Reasons that are counted apart: a chat template's may hold a row's own words."""
_Prepared = tuple[int, list[Outcome]]  # shard number and what became of its rows


@dataclass
class Counts:
    """What a source gave so far; rows_in = conversations - split_off + dropped + other_split."""

    rows_in: int = 0
    conversations: int = 0
    split_off: int = 0
    """Of these, parts of documents beyond the first of each."""
    tokens: int = 0
    truncated: int = 0
    other_split: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_countries: dict[str, int] = field(default_factory=dict)
    scrubbed: dict[str, int] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Count one row, or one part of it."""
        self.rows_in += not outcome.part
        self.split_off += outcome.part > 0
        if outcome.dropped is not None:
            known = outcome.dropped in self.dropped or len(self.dropped) < _MOST_REASONS
            _increase(self.dropped, outcome.dropped if known else "other")
            if outcome.country is not None:
                _increase(self.dropped_countries, outcome.country)
        elif outcome.conversation is None:
            self.other_split += 1
        else:
            self.conversations += 1
            self.tokens += len(outcome.conversation.token_ids)
            self.truncated += outcome.conversation.truncated
            for kind, number in outcome.scrubbed.items():
                _increase(self.scrubbed, kind, number)

    def report(self, total_tokens: int) -> dict[str, Any]:
        """The contract's object for one source."""
        values = asdict(self)
        values["rows_kept"] = self.conversations - self.split_off
        values["share"] = self.tokens / total_tokens if total_tokens else 0.0
        return values


class Feed:
    """Reads a source in order from a cursor (shard, row, part of a document)."""

    def __init__(self, source: Source, preparer: Preparer) -> None:
        self.source = source
        self.preparer = preparer
        self.counts = Counts()
        self.used_up = False
        self._shard = 0
        self._row = 0
        self._part = 0
        self._refused = 0  # rows left out since the last that was kept
        self._ready: Iterator[tuple[int, Outcome]] | None = None
        self._reader: ThreadPoolExecutor | None = None

    def next(self, pool: Executor | None, ahead: int) -> Conversation | None:
        """The next kept conversation, or None when the source is used up.

        Args:
            pool: worker processes, or None to prepare here.
            ahead: chunks kept in flight in the pool.

        Raises:
            CorpusError: the source died, a worker died, the whole source kept nothing, or an endless one nothing of
                many rows.
        """
        if self._ready is None:
            chunks = self.source.chunks(self._shard, self._row)
            outcomes = _rows(self._prepare_here(chunks) if pool is None else self._prepare_ahead(chunks, pool, ahead))
            self._ready = islice(outcomes, self._part, None)
        for shard, outcome in self._ready:
            self._shard = shard
            self._row, self._part = (outcome.row + 1, 0) if outcome.last else (outcome.row, outcome.part + 1)
            self.counts.add(outcome)
            self._refused += outcome.dropped is not None
            if outcome.conversation is not None:
                self._refused = 0
                return outcome.conversation
            if self._refused == _MOST_REFUSED and not self.source.finite:
                raise CorpusError(
                    f"{self.source.where}: {_MOST_REFUSED:,} conversations one after another were left out "
                    f"({self._reasons()}); take it out of corpus.sources, or another model's template"
                )
        self.used_up = True
        self._ready = None
        self._check_not_empty()
        return None

    def state(self) -> dict[str, Any]:
        """Cursor and counts, JSON-able."""
        cursor = {"shard": self._shard, "row": self._row, "part": self._part}
        return {**cursor, "used_up": self.used_up, "counts": asdict(self.counts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a cursor."""
        self.stop()
        self._shard, self._row, self._part = state["shard"], state["row"], state.get("part", 0)
        self.used_up = state["used_up"]
        self.counts = Counts(**state["counts"])

    def stop(self) -> None:
        """Forget what was read ahead; the cursor stays."""
        self._ready = None
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = None

    def _prepare_here(self, chunks: Iterator[Chunk]) -> Iterator[_Prepared]:
        for chunk in chunks:
            yield chunk.shard, self.preparer(chunk.rows)

    def _prepare_ahead(self, chunks: Iterator[Chunk], pool: Executor, ahead: int) -> Iterator[_Prepared]:
        """A thread reads chunk by chunk and hands each to the pool; results are taken in the order of reading."""
        self._reader = ThreadPoolExecutor(1, thread_name_prefix=f"read-{self.source.id}")

        def submit() -> tuple[int, Future[list[Outcome]]] | None:
            chunk = next(chunks, None)
            return None if chunk is None else (chunk.shard, pool.submit(prepare_in_worker, self.source.id, chunk.rows))

        in_flight = deque(self._reader.submit(submit) for _ in range(ahead))
        try:
            while (submitted := in_flight.popleft().result()) is not None:
                in_flight.append(self._reader.submit(submit))
                shard, future = submitted
                yield shard, future.result()
        except BrokenProcessPool as error:
            raise CorpusError(
                f"a worker process died while preparing corpus source {self.source.id} (out of memory?); "
                "resume with fewer corpus.workers"
            ) from error

    def _check_not_empty(self) -> None:
        counts = self.counts
        if counts.rows_in == 0:
            raise CorpusError(f"{self.source.where} has no rows; correct the source's path")
        if counts.conversations == 0 and counts.other_split == 0:
            raise CorpusError(
                f"{self.source.where} keeps none of its {counts.rows_in} rows ({self._reasons()}); "
                "correct its schema or corpus.privacy"
            )

    def _reasons(self) -> str:
        return ", ".join(f"{reason} {number}" for reason, number in sorted(self.counts.dropped.items()))


def _rows(prepared: Iterator[_Prepared]) -> Iterator[tuple[int, Outcome]]:
    for shard, outcomes in prepared:
        for outcome in outcomes:
            yield shard, outcome


def _increase(counter: dict[str, int], key: str, by: int = 1) -> None:
    counter[key] = counter.get(key, 0) + by
