"""The stream of kept conversations: sources mixed by tokens, in an order that is a pure function of (recipe, seed).

The next conversation always comes from the source that is furthest behind its share of tokens, so realised shares stay
within one conversation of the weights. Each source is read in order by a feed of its own; mixing never changes what a
source yields next. The state is one cursor per feed plus the counts, and speaks of what was returned, not of what was
read ahead.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from qwenscope.corpus.chat import Renderer, with_template
from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.documents import Documents
from qwenscope.corpus.feed import Feed
from qwenscope.corpus.prepare import Preparer
from qwenscope.corpus.privacy import PrivacyFilter, privacy_report
from qwenscope.corpus.sources import open_source, source_ids
from qwenscope.corpus.workers import worker_pool
from qwenscope.errors import CorpusError
from qwenscope.limits import check_workers
from qwenscope.recipe import CorpusRecipe
from qwenscope.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_VERSION = 2
"""Of the state: 1 counted a folder's files one after another, 2 counts them mixed."""


class CorpusStream:
    """Iterator over kept conversations."""

    def __init__(
        self,
        corpus: CorpusRecipe,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        held_out: bool = False,
        revisions: Mapping[str, str] | None = None,
        workers: int = 0,
    ) -> None:
        """Resolve every source; nothing is read before the first conversation is asked for.

        Args:
            corpus: sources, filter, lengths.
            tokenizer: a fast tokenizer; for conversations it needs a chat template, or the recipe one.
            seed: governs order and the built-in generator.
            held_out: the conversations kept for evaluation instead of those for training.
            revisions: `revisions` of an earlier run, to read the very same content.
            workers: processes that render and tokenise ahead; 0 does it here. The result is the same.

        Raises:
            CorpusError: a source is missing, empty or not what `revisions` say; names it.
            RecipeError: more workers than the machine can use.
        """
        check_workers(workers)
        tokenizer = with_template(tokenizer, corpus.chat_template)
        renderer = Renderer(tokenizer, corpus.max_length)
        documents = Documents(tokenizer, corpus.max_length, split=corpus.long_documents == "split")
        privacy = PrivacyFilter(corpus.privacy)
        self._rules = corpus.privacy
        self.held_out = held_out
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._feeds: dict[str, Feed] = {}
        self._weights: dict[str, float] = {}
        self.revisions: dict[str, str] = {}
        """Each source's revision, to be passed to later streams of the same run."""
        self.splits = tuple(dict.fromkeys(split for recipe in corpus.sources for split in recipe.splits))
        """Those of which its sources may give something."""
        for id, recipe in zip(source_ids(corpus.sources), corpus.sources, strict=True):
            source_seed = derive_seed(seed, "corpus", id)
            source = open_source(recipe, id, source_seed, held_out, (revisions or {}).get(id))
            if recipe.name != "files" or recipe.messages is not None:
                renderer.check_template()
            share = 0.0 if source.own_split else corpus.held_out_share
            preparer = Preparer(id, source.schema, renderer, documents, privacy, source_seed, held_out, share)
            self._feeds[id] = Feed(source, preparer)
            self._weights[id] = recipe.weight
            self.revisions[id] = source.revision

    def __iter__(self) -> CorpusStream:
        return self

    def __next__(self) -> Conversation:
        """The next conversation; StopIteration only when every source is used up.

        Raises:
            CorpusError: a source died, or kept nothing.
        """
        while live := [id for id, feed in self._feeds.items() if not feed.used_up]:
            id = min(live, key=lambda id: self._feeds[id].counts.tokens / self._weights[id])
            if self._workers and self._pool is None:
                self._pool = worker_pool(self._workers, {id: feed.preparer for id, feed in self._feeds.items()})
            conversation = self._feeds[id].next(self._pool, ahead=self._workers + 1)
            if conversation is not None:
                return conversation
            log.info("corpus source %s is used up after %d conversations", id, self._feeds[id].counts.conversations)
        self.close()
        raise StopIteration

    @property
    def finite(self) -> bool:
        """Whether the stream ends by itself."""
        return all(feed.source.finite for feed in self._feeds.values())

    def state(self) -> dict[str, Any]:
        """Cursor and counts after the last returned conversation, as JSON-able values."""
        return {
            "version": _VERSION,
            "held_out": self.held_out,
            "revisions": dict(self.revisions),
            "sources": {id: feed.state() for id, feed in self._feeds.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises:
            CorpusError: the state is of other sources, another split, or other revisions.
        """
        if state.get("version") != _VERSION:
            raise CorpusError(
                f"corpus state version {state.get('version')} is unknown; use the qwenscope that wrote it"
            )
        if state["held_out"] != self.held_out or set(state["sources"]) != set(self._feeds):
            raise CorpusError("the corpus state is of other sources or another split; resume with the run's own recipe")
        changed = [id for id, revision in self.revisions.items() if state["revisions"][id] != revision]
        if changed:
            raise CorpusError(f"corpus source {', '.join(changed)} is not the one the run began with; restore it")
        for id, feed in self._feeds.items():
            feed.restore(state["sources"][id])

    def report(self) -> dict[str, Any]:
        """Counts of what was returned so far.

        Returns:
            {"sources": {id: {"revision", "rows_in", "rows_kept", "conversations", "tokens", "share" (of all tokens),
            "truncated", "other_split", "dropped": {reason: n}, "dropped_countries": {name: n}, "scrubbed": {kind: n}}},
            "scrubbed": {kind: n}, "tokens", "privacy": see `privacy_report`}, where for each source
            rows_in = rows_kept + other_split + all dropped.
        """
        total = sum(feed.counts.tokens for feed in self._feeds.values())
        sources = {
            id: {"revision": self.revisions[id], **feed.counts.report(total)} for id, feed in self._feeds.items()
        }
        filtered = {id: sources[id] for id, feed in self._feeds.items() if feed.source.schema == "wildchat"}
        scrubbed: Counter[str] = Counter()
        for counts in sources.values():
            scrubbed.update(counts["scrubbed"])
        return {
            "sources": sources,
            "scrubbed": dict(scrubbed),
            "tokens": total,
            "privacy": privacy_report(self._rules, filtered),
        }

    def close(self) -> None:
        """Stop reading ahead and end the worker processes; the state stays valid."""
        for feed in self._feeds.values():
            feed.stop()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
