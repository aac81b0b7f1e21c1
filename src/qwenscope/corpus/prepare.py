"""From a chunk of raw rows to conversations: adapt the schema, filter, repair, split, render, tokenise.

Pure and picklable, so that worker processes can do it ahead of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwenscope.corpus.chat import Conversation, Layout, Renderer
from qwenscope.corpus.privacy import PrivacyFilter
from qwenscope.corpus.repair import Dropped, Message, clean, conversation_id
from qwenscope.corpus.shards import Malformed
from qwenscope.corpus.tool_use import GENERATORS


@dataclass(slots=True)
class Outcome:
    """What became of one row: exactly one of `conversation`, `dropped` and `other_split` is set."""

    row: int
    """The row's index in its shard."""
    conversation: Conversation | None = None
    dropped: str | None = None
    """The reason."""
    country: str | None = None
    """For rows dropped by country: which."""
    other_split: bool = False
    """Belongs to the held-out conversations and train was asked, or the other way round."""
    scrubbed: dict[str, int] = field(default_factory=dict)
    """Identifiers replaced, by kind."""


@dataclass(frozen=True)
class Preparer:
    """Prepares the rows of one source."""

    source: str
    schema: str
    renderer: Renderer
    privacy: PrivacyFilter
    seed: int
    """Of the built-in generator."""
    held_out: bool
    hash_share: float
    """Share held out by hash; 0 where the source has a split of its own."""

    def __call__(self, rows: list[tuple[int, Any]]) -> list[Outcome]:
        """One outcome per row, in order."""
        outcomes = []
        pending: list[tuple[Outcome, str, Layout]] = []
        for index, row in rows:
            outcome = Outcome(index)
            try:
                messages, tools = self._messages(row, outcome)
                id = conversation_id(messages, tools)
                outcome.other_split = self.hash_share > 0 and is_held_out(id, self.hash_share) != self.held_out
                if not outcome.other_split:
                    pending.append((outcome, id, self.renderer.layout(messages, tools)))
            except Dropped as drop:
                outcome.dropped, outcome.country = drop.reason, drop.country
            outcomes.append(outcome)
        rendered = self.renderer.encode([layout for *_, layout in pending])
        for (outcome, id, _), item in zip(pending, rendered, strict=True):
            outcome.conversation = Conversation.of(item, id, self.source)
        return outcomes

    def _messages(self, row: Any, outcome: Outcome) -> tuple[list[Message], list[dict[str, Any]] | None]:
        if generate := GENERATORS.get(self.schema):
            row = generate(self.seed, row, held_out=self.held_out)
        if isinstance(row, Malformed):
            raise Dropped(row.reason)
        if not isinstance(row, dict):
            raise Dropped("malformed_row")
        if self.schema == "wildchat":
            messages, _ = clean(self.privacy.apply(row), None)
            messages, outcome.scrubbed = self.privacy.scrub_all(messages)  # as rendered: text parts are joined by now
            return messages, None
        return clean(row.get("messages"), row.get("tools"))


def is_held_out(id: str, share: float) -> bool:
    """Whether a conversation belongs to the held-out ones: a function of its content alone."""
    return int(id, 16) < share * 2**64
