"""Two piles of conversations, with and without a behavior: from two places, from labels, or as pairs.

A row is one of `corpus/given.py`; rows of a `group` are never on both sides of a cross-validation. A row of pairs holds
what both have in common and two ways to go on:

    {"messages": [...], "positive": [...], "negative": [...], "tools": [...], "held_out": false}

where `messages` may be missing; `positive` and `negative` are messages each.

Legend: C conversations.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.given import KEYS, Given, RowReader, rows_of, word
from qwenscope.errors import CorpusError

EXAMPLES = Path(__file__).parent / "examples"
FEWEST = 4
"""Conversations that a pile needs to be compared at all."""
_OF_PAIRS = ("messages", "tools", "positive", "negative", "source", "language", "group", "held_out")


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


class Reader(RowReader):
    """Reads piles as the language model's corpus would."""

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
        for where, row in rows_of(data, (*KEYS, key)):
            if key not in row:
                raise CorpusError(f"{where} has no key {key}; every row needs its label")
            given.append(self.read(row, where))
            positive.append(word(row[key]) == value)
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
