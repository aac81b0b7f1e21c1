"""Tokens as people read them: a character that several tokens write stands at the first of them, the others are empty.

So the texts of a context always join to its text, in any script, and token by token nothing shifts.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

TokenText = str | bytes
"""A token's text; its bytes where they are no whole characters."""
REPLACEMENT = "\ufffd"
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def pieces_of(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> list[TokenText]:
    """The piece of each token of a whole text: together they are what the tokenizer decodes the text to."""
    ids = list(token_ids)
    if not ids:
        return []
    pieces = _inner_pieces(tokenizer, ids)  # many decoders drop a space where a text begins, or add none where it ends
    pieces[:1] = _inner_pieces(tokenizer, ids[:1], begins=True, ends=len(ids) == 1)
    if len(ids) > 1:
        pieces[-1:] = _inner_pieces(tokenizer, ids[-1:], ends=True)
    return pieces


def vocabulary_pieces(tokenizer: PreTrainedTokenizerBase, size: int) -> list[TokenText]:
    """The piece of each of the first `size` ids, as it is between other tokens."""
    return _inner_pieces(tokenizer, range(size))


def _inner_pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], begins: bool = False, ends: bool = False
) -> list[TokenText]:
    """What each token adds to a text, decoded between two others, or where the text begins or ends with it.

    The replacement character stands where a tokenizer does not tell a token's bytes.
    """
    anchor, before, after = _anchor(tokenizer)
    head, tail = ([] if begins or anchor is None else [anchor]), ([] if ends or anchor is None else [anchor])
    texts = tokenizer.batch_decode([[*head, id, *tail] for id in ids], clean_up_tokenization_spaces=False)
    pieces: list[TokenText] = [text[len(before) * len(head) : len(text) - len(after) * len(tail)] for text in texts]
    for place, (id, text) in enumerate(zip(ids, pieces, strict=True)):
        if REPLACEMENT in str(text):
            pieces[place] = _bytes_of(str(tokenizer.convert_ids_to_tokens(id))) or text
    return pieces


def _anchor(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, str, str]:
    """A token that leaves its neighbours alone, its text where a text begins, and after other tokens."""
    names = [form.format(sign) for form in ("##{}", "{}", "\u2581{}") for sign in ("a", "e", "0", "!")]
    ids: Any = tokenizer.convert_tokens_to_ids(names)
    for id in ids:
        if id is not None:
            one, two, three = tokenizer.batch_decode([[id], [id] * 2, [id] * 3], clean_up_tokenization_spaces=False)
            after = two[len(one) :]
            if after and REPLACEMENT not in two and two.startswith(one) and three == two + after:
                return id, one, after
    return None, "", ""


def readable(pieces: Sequence[TokenText]) -> list[str]:
    """Texts of successive tokens, one each; what never becomes a character is the replacement character."""
    if bytes not in set(map(type, pieces)):  # nearly always, and an index asks for each of its examples
        return cast(list[str], list(pieces))
    texts = [""] * len(pieces)
    decoder = getincrementaldecoder("utf-8")("replace")
    first = 0
    for place, piece in enumerate(pieces):
        if isinstance(piece, str):
            texts[first] += decoder.decode(b"", final=True)  # nothing, unless a character broke off
            texts[place] += piece
            first = place + 1
        else:
            texts[first] += decoder.decode(piece)
            if not decoder.getstate()[0]:
                first = place + 1
    if first < len(texts):
        texts[first] += decoder.decode(b"", final=True)
    return texts


def alone(piece: TokenText) -> str:
    """A token's text without its neighbours."""
    return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")


def _bytes_of(name: str) -> bytes | None:
    """The bytes behind a vocabulary entry, of byte-level BPE or a byte fallback; None if it is neither."""
    if fallback := _FALLBACK.fullmatch(name):
        return bytes.fromhex(fallback[1])
    if all(sign in _BYTE_OF for sign in name):
        return bytes(_BYTE_OF[sign] for sign in name)
    return None


def _byte_level_alphabet() -> dict[str, int]:
    """Byte of each character of byte-level BPE (GPT-2): printable Latin-1 stands for itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


_BYTE_OF = _byte_level_alphabet()
