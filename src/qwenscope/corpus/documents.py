"""Documents: plain texts as rows of their own, with what the tokenizer puts around a text, such as BOS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwenscope.corpus.conversation import ROLES, Rendered
from qwenscope.corpus.repair import Dropped
from qwenscope.corpus.tokens import MOST_CHARACTERS, Encoded, encoder_for
from qwenscope.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE, _TEXT = ROLES.index("template"), ROLES.index("text")
_Ids = NDArray[np.int32]


class Documents:
    """Tokenises documents with one tokenizer; longer ones are truncated, or split into rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, split: bool = False) -> None:
        """Raises CorpusError if the tokenizer is not a fast one, or leaves a row no room for text."""
        self.max_length = max_length
        self.split = split
        self._encoder = encoder_for(tokenizer)
        self._before, self._after = _around(tokenizer)
        if len(self._before) >= max_length:
            raise CorpusError(
                f"the tokenizer of {tokenizer.name_or_path} begins each text with {len(self._before)} tokens, so that "
                f"rows of {max_length} hold no text; raise corpus.max_length"
            )

    def encode(self, texts: Sequence[str]) -> list[list[Rendered]]:
        """The rows of each text: one, or as many as it takes if it is split; none if it holds no token."""
        shown = texts if self.split else [text[:MOST_CHARACTERS] for text in texts]  # far more than any row holds
        encoded = self._encoder(shown)
        return [list(self._rows(text, found)) for text, found in zip(texts, encoded, strict=True)]

    def _rows(self, text: str, encoded: Encoded) -> Iterator[Rendered]:
        """Split, each of the text's tokens is in one row; every row begins as the text does, the last one ends as it
        does.
        """
        ids, starts = encoded
        before, after = self._before, self._after
        if len(before) and ids[: len(before)].tolist() == before.tolist():  # the text says so itself
            ids, starts = ids[len(before) :], starts[len(before) :]
        if not len(ids):  # of nothing but what the tokenizer leaves out
            return
        room = self.max_length - len(before)
        whole, edges = np.concatenate([ids, after]), np.append(starts, len(text))
        firsts = range(0, len(whole), room) if self.split else range(1)
        for first in firsts:
            body = whole[first : first + room]
            roles = np.full(len(before) + len(body), _TEXT, dtype=np.uint8)
            roles[: len(before)] = roles[len(before) + max(0, len(ids) - first) :] = _TEMPLATE
            begin = edges[min(first, len(ids))] if first else 0
            end = edges[min(first + room, len(ids))] if self.split else len(text)
            truncated = not self.split and (len(whole) > room or len(text) > MOST_CHARACTERS)
            yield Rendered(np.concatenate([before, body]), roles, truncated, text[begin:end], [], None)


def checked_text(value: Any) -> str:
    """A row's text.

    Raises:
        Dropped: malformed_text, empty_text.
    """
    if not isinstance(value, str):
        raise Dropped("malformed_text")
    if not value.strip():
        raise Dropped("empty_text")
    return value


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[_Ids, _Ids]:
    """What the tokenizer writes before and after any text."""
    text = "a"
    bare: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    whole: list[int] = tokenizer(text).input_ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if start is None or not bare:
        raise CorpusError(
            f"the tokenizer of {tokenizer.name_or_path} changes a text when it puts tokens around it; not supported"
        )
    end = start + len(bare)
    return np.array(whole[:start], dtype=np.int32), np.array(whole[end:], dtype=np.int32)
