"""From a chunk of raw rows to conversations and documents: adapt the schema, filter, repair, split, render, tokenise.

Pure and picklable, so that worker processes can do it ahead of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwenscope.corpus.chat import Layout, Renderer
from qwenscope.corpus.conversation import Conversation, Rendered
from qwenscope.corpus.documents import Documents, checked_text
from qwenscope.corpus.privacy import PrivacyFilter
from qwenscope.corpus.repair import Dropped, Message, clean, conversation_id, document_id
from qwenscope.corpus.shards import Malformed
from qwenscope.corpus.tool_use import GENERATORS


@dataclass(slots=True)
class Outcome:
    """What became of one row, or of one part of a document that is split: exactly one of `conversation`, `dropped` and
    `other_split` is set.
    """

    row: int
    """The row's index in its shard."""
    part: int = 0
    """Counts the outcomes of one row."""
    last: bool = True
    """No further one of this row comes."""
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
    documents: Documents
    privacy: PrivacyFilter
    seed: int
    """Of the built-in generator."""
    held_out: bool
    hash_share: float
    """Share held out by hash; 0 where the source has a split of its own."""

    def __call__(self, rows: list[tuple[int, Any]]) -> list[Outcome]:
        """One outcome per row, or one per part of a document that is split, in order."""
        outcomes = []
        layouts: list[tuple[Outcome, str, Layout]] = []
        texts: list[tuple[Outcome, str, str]] = []
        for index, row in rows:
            outcome = Outcome(index)
            try:
                if (text := self._text(row)) is not None:
                    id = document_id(text)
                    if self._wanted(id, outcome):
                        texts.append((outcome, id, text))
                else:
                    messages, tools = self._messages(row, outcome)
                    id = conversation_id(messages, tools)
                    if self._wanted(id, outcome):
                        layouts.append((outcome, id, self.renderer.layout(messages, tools)))
            except Dropped as drop:
                outcome.dropped, outcome.country = drop.reason, drop.country
            outcomes.append(outcome)
        for (outcome, id, _), item in zip(layouts, self.renderer.encode([item for *_, item in layouts]), strict=True):
            outcome.conversation = Conversation.of(item, id, self.source)
        found = self.documents.encode([text for *_, text in texts])
        parts = {
            outcome.row: self._parts(outcome, id, items) for (outcome, id, _), items in zip(texts, found, strict=True)
        }
        return [part for outcome in outcomes for part in parts.get(outcome.row, [outcome])]

    def _wanted(self, id: str, outcome: Outcome) -> bool:
        outcome.other_split = self.hash_share > 0 and is_held_out(id, self.hash_share) != self.held_out
        return not outcome.other_split

    def _parts(self, outcome: Outcome, id: str, items: list[Rendered]) -> list[Outcome]:
        """One outcome per row of a document; the first keeps the document's id."""
        if not items:
            outcome.dropped = "empty_text"
            return [outcome]
        return [
            Outcome(
                outcome.row,
                part,
                part + 1 == len(items),
                Conversation.of(item, document_id(f"{id}#{part}") if part else id, self.source),
            )
            for part, item in enumerate(items)
        ]

    def _text(self, row: Any) -> str | None:
        """A document's text; None for whatever is none."""
        if self.schema == "rows" and isinstance(row, dict) and "messages" not in row:
            if "text" not in row:
                raise Dropped("no_text_or_messages")
            return checked_text(row["text"])
        return None

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
