"""A text or a conversation that someone gives, as tokens of the corpus' kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwenscope.corpus.chat import render
from qwenscope.corpus.conversation import Rendered
from qwenscope.corpus.documents import Documents
from qwenscope.corpus.repair import Dropped
from qwenscope.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]


def render_given(
    tokenizer: PreTrainedTokenizerBase,
    text_or_messages: str | Messages,
    tools: list[dict[str, Any]] | None = None,
    max_length: int = 4096,
) -> Rendered:
    """Plain text as a document (with BOS where the tokenizer writes it), messages through the chat template.

    Raises:
        CorpusError: no tokens, half a surrogate pair, or messages that the template refuses.
    """
    if isinstance(text_or_messages, str):
        try:
            text_or_messages.encode()
        except UnicodeEncodeError:
            raise CorpusError(
                "the text holds bytes that are no UTF-8 or half a surrogate pair; take them out"
            ) from None
        (rows,) = Documents(tokenizer, max_length).encode([text_or_messages])
        if not rows:
            raise CorpusError("there is no text to read")
        return rows[0]
    try:
        return render([dict(message) for message in text_or_messages], tools, tokenizer, max_length)
    except Dropped as dropped:
        raise CorpusError(f"the messages cannot be rendered: {dropped}") from None
