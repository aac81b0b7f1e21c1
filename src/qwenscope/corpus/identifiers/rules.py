"""What a rule is: cheap signs that a text may hold its kind, a pattern for candidates, and a check that decides.

Patterns match a bounded number of characters, so that any text is read in linear time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from qwenscope.corpus.identifiers.folding import fold_characters

Span = tuple[int, int]
Gate = Callable[[str], Sequence[Span]]
MARGIN = 200
"""Characters after a region that a candidate which starts in it may reach."""
CONTEXT = 48
"""Characters before and after a candidate that may claim or excuse it."""
_SHORT = 64
GAP = r"[ \t\r\n.\-/()\u30fc~]{0,4}"
"""What people write between the digits of one number."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Finds one kind of identifier in folded text."""

    kind: str
    gate: Gate
    """Where candidates can start; rules share gates, and each is asked once a text."""
    pattern: re.Pattern[str]
    check: Callable[[re.Match[str]], Span | None]
    """The identifier's span, which may be more or less than the candidate, or None."""
    literals: tuple[str, ...] = ("",)
    """One of them stands in every text that holds a candidate."""

    def spans(self, text: str, regions: Sequence[Span]) -> Iterator[Span]:
        """Identifiers that start in `regions`, in order; what failed as one candidate may hold another."""
        if not any(literal in text for literal in self.literals):
            return
        position = 0
        for start, end in regions:
            position = max(position, start)
            while match := self._candidate(text, position, end):
                span = self.check(match)
                if span is not None:
                    yield span
                position = match.start() + 1 if span is None else max(span[1], match.start() + 1)

    def _candidate(self, text: str, position: int, end: int) -> re.Match[str] | None:
        """The first that starts in [position, end). A search would go on through the margin, so that between a short
        region and much more text every place is tried by itself."""
        if end - position > _SHORT or len(text) - end < _SHORT:
            match = self.pattern.search(text, position, end + MARGIN)
            return match if match and match.start() < end else None
        tried = (self.pattern.match(text, place, end + MARGIN) for place in range(position, end))
        return next(filter(None, tried), None)


def everywhere(text: str) -> Sequence[Span]:
    """The gate that is open."""
    return ((0, len(text)),)


def where(sign: str) -> Gate:
    """The gate that is open for texts in which the pattern `sign` is found."""
    search = re.compile(sign).search
    return lambda text: ((0, len(text)),) if search(text) else ()


def after_words(words: Sequence[str], reach: int) -> Gate:
    """The gate that is open at each of `words`, and so many characters before its end."""

    def gate(text: str) -> Sequence[Span]:
        present = [word for word in words if word in text]  # several times as fast as one search for all
        found = re.finditer("|".join(present), text) if present else ()
        return [(max(0, match.end() - reach), match.end()) for match in found]

    return gate


_NUMBER = re.compile(rf"[0-9](?:{GAP}[0-9]){{6,}}")


def numbers(text: str) -> Sequence[Span]:
    """Where seven or more digits stand close together, and the letters before them that may belong there."""
    return [(max(0, match.start() - 12), match.end()) for match in _NUMBER.finditer(text)]


def before(match: re.Match[str]) -> str:
    """The text just before a candidate."""
    return match.string[max(0, match.start() - CONTEXT) : match.start()]


def after(match: re.Match[str], end: int | None = None) -> str:
    """The text just after a candidate, or after `end`."""
    end = match.end() if end is None else end
    return match.string[end : end + CONTEXT]


def claimed(match: re.Match[str]) -> bool:
    """Whether the words before, in the same line, make a value that documentation uses somebody's own."""
    return _OWN.search(before(match)) is not None


def cue(pattern: str) -> re.Pattern[str]:
    """`pattern` as it reads in folded text, in any case."""
    return re.compile(fold_characters(pattern), re.IGNORECASE)


def is_named_by(cue: re.Pattern[str], text: str) -> bool:
    """Whether `text` ends in a word of `cue`, but for punctuation, words such as "number is", and letters of non-Latin
    scripts, whose grammar no list holds."""
    return _named(cue, re.split("[0-9]", text)[-1])


@lru_cache(maxsize=4096)
def _named(cue: re.Pattern[str], text: str) -> bool:
    ends = [match.end() for match in cue.finditer(text)]
    if not ends:
        return False
    rest = text[ends[-1] :]
    if len(rest) > 28 or _OTHER_VALUE.search(rest):
        return False
    return all(word in _FILLERS for word in re.findall(r"[a-z\u00c0-\u024f\u1e00-\u1eff]+", rest.casefold()))


_OWN = cue(
    r"(?:\b(?:my|mine|our|his|her|their|reach me|log(?:ged)?[ \-]?in|signed in|came from|connect(?:ed|ing|ion)? from|"
    r"meine?|unsere?|mi|nuestr[oa]|mon|ma|notre|mia|mio|minha|meu|мо[йяё]|мою|наш)\b"
    r"|我的|我们的|私の|僕の|제 |내 )[^\n;]*$"
)
_OTHER_VALUE = re.compile(r"[A-Za-z_]\(|\n\s*\n|[;{}|].*[;{}|]")
_FILLERS = frozenset(
    re.findall(
        r"\S+",
        """a al am an and at auf back below code de deg della der die direct dit do e es est et for free
        ganz given her him his home id is ist it la lautet le line là me meg mein meine mi mig mij minut
        mnie my mě n na naar nam new no nr num number numbers numer numero numeroon numerze nummer numéro
        número o of office on only op or our please pod por private på s self sob sur số the their them this
        til to toll un una under unter us van ved voor was werk with work you your è é és čísle číslo""",
    )
)
