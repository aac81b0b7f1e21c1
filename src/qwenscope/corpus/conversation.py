"""What the corpus gives: conversations and documents as token ids, with the role that each token plays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from qwenscope.corpus.repair import Message, split_of
from qwenscope.recipe_nodes import Role

ROLES: tuple[str, ...] = get_args(Role)
"""Index = code in `roles`. Delimiters such as <|im_start|>, <think> and <tool_call>, the role names after them, and
what a tokenizer puts around a text by itself (BOS) are `template`; the tool list is `system`; everything between
<tool_call> and </tool_call> is `tool_call`; a document is `text`."""

Roles = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation, or a document or part of one, as the language model sees it (T tokens)."""

    token_ids: NDArray[np.int32]
    """[T]"""
    roles: Roles
    """[T], codes of ROLES."""
    truncated: bool
    text: str
    """The whole text that was tokenised, before truncation; of a document that is split, this part's."""
    messages: list[Message]
    """What was rendered, after repairs; none of a document."""
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of the corpus: a conversation, or a document or part of one (T tokens)."""

    id: str
    """16 hex digits of the content's hash: stable over runs."""
    source: str
    """The source's id in the recipe: its name, with #2, #3 ... where the name stands more than once."""
    split: str
    """`text` for a document, `tool_use` for a conversation with tools or tool calls, else `chat`."""
    token_ids: NDArray[np.int32]
    """[T]"""
    roles: Roles
    """[T], codes of ROLES."""
    truncated: bool
    messages: list[Message]
    """What was rendered, after privacy filter and repairs; none of a document."""
    tools: list[dict[str, Any]] | None
    text: str
    """As in `Rendered`."""

    @classmethod
    def of(cls, rendered: Rendered, id: str, source: str) -> Conversation:
        """What was rendered, under its source's id."""
        return cls(
            id=id,
            source=source,
            split=split_of(rendered.messages, rendered.tools),
            token_ids=rendered.token_ids,
            roles=rendered.roles,
            truncated=rendered.truncated,
            messages=rendered.messages,
            tools=rendered.tools,
            text=rendered.text,
        )
