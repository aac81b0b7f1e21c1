"""Two piles of conversations, with and without a behavior: from two places, from labels, or as pairs.

A row is one of the corpus (`messages` and optional `tools`, or `text`), and may say its `source`, `language` and
`group`: rows of a group are never on both sides of a cross-validation. A row of pairs holds what both have in common
and two ways to go on:

    {"messages": [...], "positive": [...], "negative": [...], "tools": [...], "held_out": false}

where `messages` may be missing; `positive` and `negative` are messages each.

Legend: C conversations.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qwenscope.corpus.anything import render_given
from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.repair import Dropped, clean, conversation_id, document_id, parse_json
from qwenscope.corpus.sources import FileSource, open_source
from qwenscope.errors import CorpusError, reason
from qwenscope.recipe import SourceRecipe

EXAMPLES = Path(__file__).parent / "examples"
FEWEST = 4
"""Conversations that a pile needs to be compared at all."""
_KEYS = ("messages", "tools", "text", "source", "language", "group")
Row = Mapping[str, Any]
_OF_PAIRS = ("messages", "tools", "positive", "negative", "source", "language", "group", "held_out")


@dataclass(frozen=True)
class Given:
    """A conversation and what its row says of it."""

    conversation: Conversation
    group: str
    language: str


@dataclass(frozen=True)
class Piles:
    """C conversations, each with the behavior or without it."""

    given: list[Given]
    positive_C: NDArray[np.bool_]
    paired: bool = False
    """Conversations 2p (positive) and 2p + 1 are a pair."""

    @property
    def conversations(self) -> list[Conversation]:
        """In the order of the labels."""
        return [each.conversation for each in self.given]

    @property
    def groups_C(self) -> NDArray[np.int64]:  # noqa: N802
        """Number of each conversation's group."""
        return np.unique([each.group for each in self.given], return_inverse=True)[1]


@dataclass(frozen=True)
class Reader:
    """Makes conversations of rows as the language model's corpus would."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def two_piles(self, positive: Path, negative: Path) -> Piles:
        """Everything in one place against everything in another.

        Raises:
            CorpusError: a place cannot be read, or holds too little.
        """
        sides = [self.pile(positive), self.pile(negative)]
        return labelled(sides[0] + sides[1], [True] * len(sides[0]) + [False] * len(sides[1]))

    def labelled(self, data: Path, key: str, value: str) -> Piles:
        """One place, whose rows say under `key` where they belong: those with `value` against all others.

        Raises:
            CorpusError: it cannot be read, a row has no such key, or a side holds too little.
        """
        given, positive = [], []
        for where, row in rows_of(data, (*_KEYS, key)):
            if key not in row:
                raise CorpusError(f"{where} has no key {key}; every row needs its label")
            given.append(self.read(row, where))
            positive.append(_word(row[key]) == value)
        return labelled(given, positive)

    def pairs(self, path: Path, *, held_out: bool | None = None) -> Piles:
        """Rows of two conversations that differ in the behavior.

        Args:
            path: file or folder.
            held_out: only the rows that say so, or only the others; None takes all.

        Raises:
            CorpusError: it cannot be read, a row lacks a side, or there are too few.
        """
        given: list[Given] = []
        for where, row in rows_of(path, _OF_PAIRS):
            if held_out is not None and bool(row.get("held_out")) != held_out:
                continue
            for side in ("positive", "negative"):
                if not isinstance(row.get(side), list) or not isinstance(row.get("messages", []), list):
                    raise CorpusError(f"{where}: a pair needs messages under positive and negative")
                whole = {**row, "messages": [*row.get("messages", []), *row[side]], "group": row.get("group", where)}
                given.append(self.read(whole, where))
        return dataclasses.replace(labelled(given, [True, False] * (len(given) // 2)), paired=True)

    def pile(self, path: Path) -> list[Given]:
        """All conversations of a place.

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
        return Given(conversation, str(row.get("group", id)), str(row.get("language") or script(text)))


def example_names() -> list[str]:
    """The behaviors of which pairs are packaged."""
    return sorted(path.stem for path in EXAMPLES.glob("*.jsonl"))


def example_path(name: str) -> Path:
    """The packaged pairs of a behavior.

    Raises:
        CorpusError: there are none of that name.
    """
    if name not in example_names():
        raise CorpusError(f"there is no example {name!r}; there are {', '.join(example_names())}")
    return EXAMPLES / f"{name}.jsonl"


def script(text: str) -> str:
    """The writing system of most of a text's letters, such as latin or cjk; none where there are no letters.

    Examples:
        >>> script("Добрый день, Anna"), script("12 %")
        ('cyrillic', 'none')
    """
    letters = Counter(unicodedata.name(sign, "?").split(" ", 1)[0].lower() for sign in text[:2000] if sign.isalpha())
    return letters.most_common(1)[0][0] if letters else "none"


def rows_of(path: Path, keys: Sequence[str] = _KEYS) -> Iterator[tuple[str, Row]]:
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


def _word(value: Any) -> str:
    """A label as it is written on a command line: true, 1, formal."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def labelled(given: list[Given], positive: list[bool]) -> Piles:
    """Conversations with their labels.

    Raises:
        CorpusError: a pile has fewer than FEWEST.
    """
    positive_C = np.array(positive, dtype=bool)
    for name, count in (("positive", int(positive_C.sum())), ("negative", int((~positive_C).sum()))):
        if count < FEWEST:
            raise CorpusError(f"the {name} pile has {count} conversations; at least {FEWEST} are needed")
    return Piles(given, positive_C)
