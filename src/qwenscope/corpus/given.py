"""Conversations that someone gives, row by row, with what a row says of itself.

A row is one of the corpus (`messages` and optional `tools`, or `text`), and may say its `source`, `language`, `group`
and `labels` ({name: value}).
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenscope.corpus.anything import render_given
from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.repair import Dropped, clean, conversation_id, document_id, parse_json
from qwenscope.corpus.sources import FileSource, open_source
from qwenscope.errors import CorpusError, reason
from qwenscope.recipe import SourceRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEYS = ("messages", "tools", "text", "source", "language", "group", "labels")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Given:
    """A conversation and what its row says of it."""

    conversation: Conversation
    group: str
    language: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RowReader:
    """Makes conversations of rows as the language model's corpus would."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def pile(self, path: Path) -> list[Given]:
        """All conversations of a file or folder.

        Raises:
            CorpusError: it cannot be read.
        """
        return [self.read(row, where) for where, row in rows_of(path)]

    def read(self, row: Row, where: str) -> Given:
        """One row, found at `where`.

        Raises:
            CorpusError: it is no conversation.
        """
        try:
            if isinstance(row.get("messages"), list):
                messages, tools = clean(row["messages"], row.get("tools"))
                id, text = conversation_id(messages, tools), " ".join(message["content"] for message in messages)
                rendered = render_given(self.tokenizer, messages, tools, self.max_length)
            elif isinstance(row.get("text"), str):
                id, text = document_id(row["text"]), row["text"]
                rendered = render_given(self.tokenizer, text, max_length=self.max_length)
            else:
                raise CorpusError("neither messages nor text")
        except (CorpusError, Dropped) as error:
            raise CorpusError(f"{where}: {error}") from None
        conversation = Conversation.of(rendered, id, str(row.get("source") or "unknown"))
        group, language = str(row.get("group", id)), str(row.get("language") or script(text))
        return Given(conversation, group, language, _labels(row, where))


def script(text: str) -> str:
    """The writing system of most of a text's letters, such as latin or cjk; none where there are no letters.

    Examples:
        >>> script("Добрый день, Anna"), script("12 %")
        ('cyrillic', 'none')
    """
    letters = Counter(unicodedata.name(sign, "?").split(" ", 1)[0].lower() for sign in text[:2000] if sign.isalpha())
    return letters.most_common(1)[0][0] if letters else "none"


def rows_of(path: Path, keys: Sequence[str] = KEYS) -> Iterator[tuple[str, Row]]:
    """(file:number, row) of a file or folder, with `keys` of each row.

    Raises:
        CorpusError: it cannot be read.
    """
    source = open_source(SourceRecipe(name="files", weight=1.0, path=path), str(path), 0, True, None)
    assert isinstance(source, FileSource)
    source = dataclasses.replace(source, columns={key: key for key in keys}, where=str(path))
    for chunk in source.chunks(0, 0):
        name = source.groups[chunk.shard][0].name
        for index, row in chunk.rows:
            yield _checked(f"{name}:{index + 1}", row)


def rows_of_lines(lines: Iterable[str], name: str) -> Iterator[tuple[str, Row]]:
    """(name:number, row) of lines of JSON; blank ones are passed over.

    Raises:
        CorpusError: a line is not JSON.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise CorpusError(f"{name}:{number} is not JSON ({reason(error)})") from None
            yield _checked(f"{name}:{number}", row)


def _checked(where: str, row: Any) -> tuple[str, Row]:
    if not isinstance(row, dict):  # or Malformed
        raise CorpusError(f"{where} is no JSON object that can be read")
    return where, row


def word(value: Any) -> str:
    """A label as it is written on a command line: true, 1, formal."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _labels(row: Row, where: str) -> dict[str, str]:
    given = row.get("labels")
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(value, str | int | None) for value in given.values()):
        raise CorpusError(f"{where}: labels must be {{name: word or whole number}}")
    return {str(name): word(value) for name, value in given.items() if value is not None}
