"""What can be said of a token in every corpus: the labels that sparse probing looks for.

Legend: T tokens of a conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenscope.corpus.conversation import ROLES, Conversation
from qwenscope.corpus.given import Given

Tokenizer = Any
Categories = dict[str, NDArray[np.object_]]
"""{family: what each token is in it, or None where that does not exist}, [T] each."""

EARLY = 32
"""Tokens that a conversation begins with."""
FAMILIES = ("role", "next token", "position", "split", "source", "tool")


def categories(conversation: Conversation, tokenizer: Tokenizer) -> Categories:
    """What each token of a conversation is, by family.

    `role` is the token's; `next token` the shape of the token after it; `position` early or late; `split` and `source`
    are the conversation's; `tool` names, on tokens of tool calls, the tool of a conversation that calls only one.
    """
    ids, roles = conversation.token_ids, np.array(ROLES, dtype=object)[conversation.roles]
    length = len(ids)
    shapes = np.array([*(_shape_of(tokenizer, int(id)) for id in ids[1:]), None], dtype=object)
    called = {call["function"]["name"] for message in conversation.messages for call in message.get("tool_calls") or ()}
    tool = np.full(length, called.pop() if len(called) == 1 else None, dtype=object)
    tool[roles != "tool_call"] = None
    return {
        "role": roles,
        "next token": shapes[:length],
        "position": np.where(np.arange(length) < EARLY, "early", "late").astype(object),
        "split": np.full(length, conversation.split, dtype=object),
        "source": np.full(length, conversation.source, dtype=object),
        "tool": tool,
    }


def letters(conversation: Conversation, tokenizer: Tokenizer) -> Categories:
    """The first letter of each token, in lower case, after any space; None of a token that begins with no letter."""
    found = [_letter_of(tokenizer, int(id)) for id in conversation.token_ids]
    return {"letter": np.array(found, dtype=object)}


def binary(values_R: NDArray[np.object_]) -> Iterator[tuple[str, NDArray[np.bool_], NDArray[np.bool_]]]:
    """(name, which rows are it, which rows count) of each category; of two, the first stands for both."""
    known_R = np.array([value is not None for value in values_R], dtype=bool)
    names = sorted(set(values_R[known_R].tolist()))
    for name in names if len(names) > 2 else names[:1] if len(names) == 2 else ():
        yield name, np.array(values_R == name, dtype=bool), known_R


def shape(text: str) -> str:
    """`space`, `digit`, `word` (a new one), `word part` or `sign`."""
    core = text.strip()
    if not core:
        return "space"
    if core[0].isdigit():
        return "digit"
    if not core[0].isalpha():
        return "sign"
    return "word" if text[0].isspace() else "word part"


def stated(given: Given, families: Iterable[str]) -> Categories:
    """What a row says of its conversation, of each of its tokens: its label in each family, or None."""
    length = len(given.conversation.token_ids)
    return {family: np.full(length, given.labels.get(family), dtype=object) for family in families}


def joined(parts: Iterable[Categories]) -> Categories:
    """The categories of several conversations in turn; all have the same families."""
    parts = list(parts)
    return {family: np.concatenate([part[family] for part in parts]) for family in parts[0]}


@lru_cache(maxsize=1 << 16)
def _shape_of(tokenizer: Tokenizer, id: int) -> str:
    return "special" if id in tokenizer.all_special_ids else shape(tokenizer.decode([id]))


@lru_cache(maxsize=1 << 16)
def _letter_of(tokenizer: Tokenizer, id: int) -> str | None:
    core = "" if id in tokenizer.all_special_ids else tokenizer.decode([id]).strip()
    return core[0].lower() if core and core[0].isalpha() else None
