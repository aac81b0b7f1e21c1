"""Structured identifiers in text of any script: a pattern finds each candidate, a check decides.

`folding` makes spellings alike, `rules` walks a text, and a file per family holds its rules: `contacts` (e-mail,
phone),
`accounts` (user names), `network`, `payment`, `national`, `secrets`. Checks are registry lengths and checksums
(python-stdnum), numbering plans (phonenumbers) and address registries (ipaddress). Values that documentation uses
(example.com, test cards, 192.0.2.0/24, private networks) stay, unless the words before claim them as somebody's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwenscope.corpus.identifiers import accounts, contacts, national, network, payment, secrets
from qwenscope.corpus.identifiers.contacts import is_spelled
from qwenscope.corpus.identifiers.folding import Folded, fold
from qwenscope.corpus.identifiers.rules import Rule

RULES: tuple[Rule, ...] = (
    *secrets.RULES,
    *contacts.RULES,
    *accounts.RULES,
    *network.RULES,
    *payment.RULES,
    *national.RULES,
)
_MAYBE = re.compile(r"[\d@\uff20\ufe6b/]|PRIVATE KEY|hf_|commat|(?:at|AT)[\uff09\uff3d]")  # no identifier is without
_ZERO_WIDTH_SPACE = "\u200b"
_BY_GATE = {gate: [rule for rule in RULES if rule.gate is gate] for gate in {rule.gate for rule in RULES}}
KINDS = tuple(sorted({rule.kind for rule in RULES}))


@dataclass(frozen=True, slots=True, order=True)
class Identifier:
    """A span of text; `kind` is one of KINDS."""

    start: int
    end: int
    kind: str


def find_identifiers(text: str) -> list[Identifier]:
    """Identifiers in order, none overlapping; of two that overlap the one that starts first stays, then the longer.

    Examples:
        >>> find_identifiers("mail bo@firm.de")
        [Identifier(start=5, end=15, kind='EMAIL_ADDRESS')]
    """
    if not _MAYBE.search(text) and not is_spelled(text):
        return []
    found = _found(fold(text))
    if _ZERO_WIDTH_SPACE in text:  # within an identifier it is nothing, between two words a space
        found += _found(fold(text.replace(_ZERO_WIDTH_SPACE, " ")))
    kept: list[Identifier] = []
    for identifier in sorted(found, key=lambda found: (found.start, -found.end)):
        if not kept or identifier.start >= kept[-1].end:
            kept.append(identifier)
    return kept


def _found(folded: Folded) -> list[Identifier]:
    """Of every rule, in the original's places."""
    found = []
    for gate, rules in _BY_GATE.items():
        if regions := gate(folded.text):
            for rule in rules:
                found += [Identifier(*folded.span(*span), rule.kind) for span in rule.spans(folded.text, regions)]
    return found
