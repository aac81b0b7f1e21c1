"""One spelling for characters that look or read alike, with the way back to the original text."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_IGNORED = re.compile(  # soft hyphen, zero-width and direction marks, variation selectors, keycap
    "[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\u20e3\ufe00-\ufe0f\ufeff]"
)
MARK = "\u02d0"
"""Stands for any combining mark: a letter, so that words of every script are runs of `\\w`."""


@dataclass(frozen=True, slots=True)
class Folded:
    """`text` as patterns read it; `origins` gives each character's place in the original, None where they are equal."""

    text: str
    origins: list[int] | None

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The span of the original text that [start, end) of the folded text came from; not for empty spans."""
        return (start, end) if self.origins is None else (self.origins[start], self.origins[end - 1] + 1)


def fold(text: str) -> Folded:
    """Compatibility forms, digits, spaces and dashes of every script in their ASCII form; invisible characters removed.

    Examples:
        >>> fold("４５３９–１４８８").text
        '4539-1488'
    """
    if text.isascii():
        return Folded(text, None)
    if not _IGNORED.search(text):
        return Folded(text.translate(_TABLE), None)
    origins: list[int] = []
    start = 0
    for ignored in _IGNORED.finditer(text):
        origins.extend(range(start, ignored.start()))
        start = ignored.end()
    origins.extend(range(start, len(text)))
    return Folded(_IGNORED.sub("", text).translate(_TABLE), origins)


class _Table(dict[int, int]):
    """One character for each code point, worked out when first seen."""

    def __missing__(self, code: int) -> int:
        self[code] = folded = ord(_fold_character(chr(code)))
        return folded


_TABLE = _Table()


def _fold_character(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category == "Zs":
        return " "
    if category in ("Zl", "Zp") or char == "\x85":
        return "\n"
    if category == "Pd" or char == "\u2212":  # dashes and the minus sign
        return "-"
    if category in ("Mn", "Mc"):
        return MARK
    plain = unicodedata.normalize("NFKC", char)
    raised = unicodedata.decomposition(char).startswith(("<super>", "<sub>"))
    return plain if len(plain) == 1 and not raised else char
