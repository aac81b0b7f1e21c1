"""Texts to token ids with a fast tokenizer, in batches, and where in its text each token begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, decoders

from qwenscope.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 2_000_000
"""Of what is tokenised at a time: the tokenizer takes some 130 bytes for each."""

Encoded = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Token ids [T], and the index of each token's first character [T]."""


class Encoder:
    """One tokenizer's ids for texts, without what it would put around them; holds what can be worked out once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises CorpusError if the tokenizer is not a fast one."""
        if not tokenizer.is_fast:
            raise CorpusError(
                f"the tokenizer of {tokenizer.name_or_path} has no tokenizer.json; only fast ones are read"
            )
        self._backend = tokenizer.backend_tokenizer
        self.normalise: Callable[[str], str] | None = None
        """What the tokenizer does to a text before anything else."""
        if self._backend.normalizer is not None:
            self.normalise = self._backend.normalizer.normalize_str
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        added = set(tokenizer.get_added_vocab())
        size = max(vocabulary.values()) + 1
        self.is_added_V = np.zeros(size, dtype=bool)
        """Whether each id is one of the tokenizer's added (control) tokens."""
        self.is_added_V[[vocabulary[token] for token in added]] = True
        self._bytes_V: NDArray[np.int64] | None = None
        if isinstance(self._backend.decoder, decoders.ByteLevel):  # one character of a token's name is one byte
            self._bytes_V = np.zeros(size, dtype=np.int64)
            for token, index in vocabulary.items():
                self._bytes_V[index] = len(token.encode()) if token in added else len(token)

    def __call__(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids and first characters of each text. One of more than MOST_CHARACTERS is tokenised in parts of that size
        at most, cut before a line's end or a space.
        """
        self._backend.no_truncation()  # a tokenizer may have been saved, or called elsewhere, with either
        self._backend.no_padding()
        encode = self._backend.encode_batch if self._bytes_V is None else self._backend.encode_batch_fast  # no offsets
        parts: list[list[Encoded]] = [[] for _ in texts]
        for group in _groups(texts):
            encodings = encode([text for *_, text in group], add_special_tokens=False)
            for (number, start, text), encoding in zip(group, encodings, strict=True):
                ids = np.array(encoding.ids, dtype=np.int32)
                parts[number].append((ids, start + self._starts(text, ids, encoding)))
        return [found[0] if len(found) == 1 else _joined(found) for found in parts]

    def _starts(self, text: str, ids: NDArray[np.int32], encoding: Encoding) -> NDArray[np.int64]:
        """Index of each token's first character, [T]."""
        if self._bytes_V is not None:
            raw = np.frombuffer(text.encode(), dtype=np.uint8)
            lengths = self._bytes_V[ids]
            ends = np.cumsum(lengths)
            if len(ends) and ends[-1] == len(raw):
                starts = ends - lengths
                return starts if text.isascii() else (np.cumsum((raw & 0xC0) != 0x80) - 1)[starts]
            encoding = self._backend.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.minimum(offsets[:, 0], len(text) - 1)


@lru_cache(maxsize=4)
def encoder_for(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The tokenizer's encoder; its tables over the vocabulary are worked out once (0.3 s for 150,000 tokens).

    Raises:
        CorpusError: the tokenizer is not a fast one.
    """
    return Encoder(tokenizer)


_Part = tuple[int, int, str]  # the text's number, where the part begins in it, and the part


def _groups(texts: Sequence[str]) -> Iterator[list[_Part]]:
    """All parts of all texts in their order, in groups of at most MOST_CHARACTERS."""
    group: list[_Part] = []
    characters = 0
    for number, text in enumerate(texts):
        for start, part in _parts(text):
            if group and characters + len(part) > MOST_CHARACTERS:
                yield group
                group, characters = [], 0
            group.append((number, start, part))
            characters += len(part)
    if group:
        yield group


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """(start, part) of at most MOST_CHARACTERS, cut before the last line's end, else the last space, of each."""
    start = 0
    while len(text) - start > MOST_CHARACTERS:
        end = start + MOST_CHARACTERS
        found = (text.rfind(mark, start + 1, end) for mark in "\n ")
        cut = next((place for place in found if place > start), end)
        yield start, text[start:cut]
        start = cut
    yield start, text[start:] if start else text


def _joined(parts: Sequence[Encoded]) -> Encoded:
    ids, starts = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(starts)
