"""One spelling for characters that look or read alike, with the way back to the original text."""

from __future__ import annotations

import html
import re
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass, field, replace

_IGNORED = "\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\u20e3\ufe00-\ufe0f\ufeff"
"""Soft hyphen, zero-width and direction marks, variation selectors, keycap."""
_REWRITTEN = re.compile(  # besides: one character as JSON, URLs and HTML write it, and [.]; a set first is fastest
    rf"[{_IGNORED}\\%&\[](?:(?<=[{_IGNORED}])|(?<=\\)(?:[nrt]|u[0-9A-Fa-f]{{4}})|(?<=%)[2-7][0-9A-Fa-f]"
    r"|(?<=&)(?:#[0-9]{2,5}|#[xX][0-9A-Fa-f]{2,4}|nbsp|amp|commat);|(?<=\[)\.\])"
)
MARK = "\u02d0"
"""Stands for any combining mark: a letter, so that words of every script are runs of `\\w`."""


@dataclass(frozen=True, slots=True)
class Folded:
    """`text` as patterns read it, and where its characters stand in the original."""

    text: str
    starts: list[int] = field(default_factory=lambda: [0])
    """Where pieces of `text` begin that are runs of the original."""
    shifts: list[int] = field(default_factory=lambda: [0])
    """By how much each piece stands further right in the original."""
    widths: dict[int, int] = field(default_factory=dict)
    """The characters of the original for each place in `text` that stands for more than one."""

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The span of the original text that [start, end) of the folded text came from; not for empty spans."""
        return self._origin(start), self._origin(end - 1) + self.widths.get(end - 1, 1)

    def _origin(self, place: int) -> int:
        return place + self.shifts[bisect_right(self.starts, place) - 1]


def fold(text: str) -> Folded:
    """Compatibility forms, digits, spaces and dashes of every script in their ASCII form; invisible characters removed;
    escapes as the character that they stand for.

    Examples:
        >>> fold("４５３９–１４８８").text
        '4539-1488'
        >>> fold(r"a\u0040b%2Ec&nbsp;").text
        'a@b.c '
    """
    rewritten = _REWRITTEN.finditer(text) if _may_be_rewritten(text) else ()
    folded = Folded("")
    pieces: list[str] = []
    end = length = 0
    for match in rewritten:
        pieces.append(text[end : match.start()])
        length += match.start() - end
        end = match.end()
        if len(match[0]) > 1:
            pieces.append(_meaning(match[0]))
            folded.starts.append(length)
            folded.shifts.append(match.start() - length)
            folded.widths[length] = len(match[0])
            length += 1
        folded.starts.append(length)
        folded.shifts.append(end - length)
    plain = "".join([*pieces, text[end:]]) if end else text
    return replace(folded, text=plain if plain.isascii() else plain.translate(_TABLE))


def fold_characters(text: str) -> str:
    """`text` with each character in its folded form."""
    return text.translate(_TABLE)


def _may_be_rewritten(text: str) -> bool:
    return not text.isascii() or "\\" in text or "%" in text or "&" in text or "[.]" in text


def _meaning(escape: str) -> str:
    if escape[0] == "\\":
        return {"n": "\n", "r": "\r", "t": "\t"}.get(escape[1]) or chr(int(escape[2:], 16))
    if escape[0] == "%":
        return chr(int(escape[1:], 16))
    return (html.unescape(escape)[:1] or "\ufffd") if escape[0] == "&" else "."


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
