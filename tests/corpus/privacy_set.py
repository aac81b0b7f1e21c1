"""The project's own privacy set: invented identifiers of every kind in sentences of many languages, and innocent ones.

Deterministic. Checksums are computed here from their published rules, not by the code under test. Run as a script, it
prints the table of docs/corpus.md and, with --errors, what is missed or taken wrongly:

    PYTHONPATH=src python tests/corpus/privacy_set.py [--errors]
"""

from __future__ import annotations

import random
import re
import string
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from privacy_values import TEMPLATES, VALUES, drawn, handle, national_id, national_phone, passport

from qwenscope.corpus.identifiers import find_identifiers

NATIVE_DIGITS = {"ar": "٠١٢٣٤٥٦٧٨٩", "fa": "۰۱۲۳۴۵۶۷۸۹", "hi": "०१२३४५६७८९", "th": "๐๑๒๓๔๕๖๗๘๙"}
WIDE_DIGITS = {"zh": "０１２３４５６７８９", "ja": "０１２３４５６７８９", "ko": "０１２３４５６７８９"}


@dataclass(frozen=True)
class Sentence:
    """`start:end` of the text is an identifier of `kind`; an innocent sentence has kind None."""

    language: str
    text: str
    kind: str | None
    start: int = 0
    end: int = 0


@dataclass
class Score:
    planted: int = 0
    right: int = 0
    found: int = 0

    def row(self, name: str) -> str:
        recall = f"{self.right / self.planted:.3f}" if self.planted else "-"
        precision = f"{self.right / self.found:.3f}" if self.found else "-"
        return f"| {name} | {self.planted:,} | {recall} | {precision} |"


def privacy_set() -> list[Sentence]:
    """All sentences; the same in every run."""
    rng = random.Random(20260101)
    sentences = []
    for language, templates in TEMPLATES.items():
        sentences += [Sentence(language, text, None) for text in templates["innocent"]]
        sentences += [_innocent(rng, language) for _ in range(30)]
        for kind, make in VALUES.items():
            sentences += [_planted(rng, language, kind, make(rng), rng.choice(templates["near"])) for _ in range(10)]
        for key, kind, make in (
            ("phone", "PHONE_NUMBER", national_phone),
            ("id", "NATIONAL_ID", national_id),
            ("passport", "NATIONAL_ID", passport),
            ("handle", "USERNAME", handle),
        ):
            for _ in range(6 if key in templates else 0):
                carrier = rng.choice(templates[key])
                sentences.append(_planted(rng, language, kind, make(rng, language), carrier))
    return sentences


def scores(sentences: list[Sentence]) -> tuple[dict[str, Score], dict[str, Score], list[str]]:
    """By kind, by language, and one line per error. Right is a find with the planted kind and exactly its span."""
    kinds: dict[str, Score] = defaultdict(Score)
    languages: dict[str, Score] = defaultdict(Score)
    errors = []
    for sentence in sentences:
        found = find_identifiers(sentence.text)
        for identifier in found:
            kinds[identifier.kind].found += 1
            languages[sentence.language].found += 1
        right = any((i.kind, i.start, i.end) == (sentence.kind, sentence.start, sentence.end) for i in found)
        if sentence.kind is not None:
            for score in (kinds[sentence.kind], languages[sentence.language]):
                score.planted += 1
                score.right += right
        if len(found) != right or right != (sentence.kind is not None):
            spans = [(i.kind, sentence.text[i.start : i.end]) for i in found]
            planted = sentence.text[sentence.start : sentence.end]
            errors.append(f"{sentence.language} {sentence.kind} {planted!r} in {sentence.text!r}: {spans}")
    return dict(sorted(kinds.items())), dict(languages), errors


def table() -> str:
    """What docs/corpus.md shows."""
    sentences = privacy_set()
    kinds, languages, _ = scores(sentences)
    innocent = sum(sentence.kind is None for sentence in sentences)
    lines = [f"{len(sentences):,} sentences, {innocent:,} of them innocent.", ""]
    for title, rows in (("kind", kinds), ("language", languages)):
        lines += [f"| {title} | planted | recall | precision |", "|---|---|---|---|"]
        lines += [score.row(f"`{name}`" if title == "kind" else name) for name, score in rows.items()]
        lines += [""]
    return "\n".join(lines).rstrip()


def _planted(rng: random.Random, language: str, kind: str, value: str, carrier: str) -> Sentence:
    value = _respelled(rng, language, kind, value)
    before, _, after = carrier.replace("{{", "\0").replace("}}", "\1").partition("{}")
    before, after = (part.replace("\0", "{").replace("\1", "}") for part in (before, after))
    if kind == "USERNAME" and "/" in value:  # the name is what must go, not the address
        before, value = before + value[: value.rindex("/") + 1], value[value.rindex("/") + 1 :]
        if value.startswith("@"):
            before, value = before + "@", value[1:]
    after = after.replace("{}", "")
    return Sentence(language, before + value + after, kind, len(before), len(before) + len(value))


def _respelled(rng: random.Random, language: str, kind: str, value: str) -> str:
    """The value as people type it: other spaces, dashes and digits, invisible characters, a line break."""
    way = rng.randrange(8)
    others = NATIVE_DIGITS.get(language) or WIDE_DIGITS.get(language)
    numeric = kind in ("PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE", "NATIONAL_ID", "IP_ADDRESS")
    if way == 0 and others and numeric and not re.search("[A-Fa-f]", value):
        return value.translate(str.maketrans(string.digits, others))
    if way == 1:
        return value.replace(" ", "\u00a0")
    if way == 2 and kind in ("PHONE_NUMBER", "CREDIT_CARD"):
        return value.replace("-", rng.choice("\u2010\u2011\u2013\u2212"))
    if way == 3 and kind in ("IBAN_CODE", "CREDIT_CARD"):
        return value.replace(" ", "  ")
    if way == 4 and kind == "IBAN_CODE":
        return value.lower() if language != "code" else value.replace(" ", "\n", 1)
    if way == 5 and kind == "EMAIL_ADDRESS":
        return value.replace("@", rng.choice(("\uff20", "%40")))
    if way == 6 and numeric:
        middle = len(value) // 2
        return value[:middle] + "\u200b" + value[middle:]
    return value


def _innocent(rng: random.Random, language: str) -> Sentence:
    """A value that no rule may take, in a sentence that takes any."""
    value = rng.choice([
        f"{rng.randint(2000, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d} "
        f"{rng.randint(10, 23)}:{rng.randint(10, 59)}:{rng.randint(10, 59)}",
        f"17{drawn(rng, '########')}", f"17{drawn(rng, '###########')}",
        f"v{rng.randint(1, 9)}.{rng.randint(0, 30)}.{rng.randint(0, 30)}",
        f"{rng.random()}", f"{rng.random() * 1000}", rng.randbytes(20).hex(), rng.randbytes(32).hex(),
        f"#{rng.randbytes(3).hex()}",
        f"10.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}",
        f"192.168.{rng.randint(0, 255)}.{rng.randint(1, 254)}",
        f"user{rng.randint(1, 99)}@example.com", f"{rng.randint(1, 9)} {drawn(rng, '###')} {drawn(rng, '###')}",
        f"978-3-16-{drawn(rng, '1#####')}-{rng.randint(0, 9)}", f"{rng.randint(100, 999)}x{rng.randint(100, 999)}",
        f"10.1000/{rng.randint(100, 999)}", f"ORD-{drawn(rng, '1#######')}",
        f"{rng.randint(10, 99)}:{rng.randint(10, 59)}",
        "-".join((rng.randbytes(4).hex(), rng.randbytes(2).hex(), "4" + rng.randbytes(2).hex()[1:],
        "a" + rng.randbytes(2).hex()[1:], rng.randbytes(6).hex())),
        f"({rng.randint(1, 9)}, {rng.randint(1, 9)}, {rng.randint(1, 9)})",
        f"{rng.randint(10, 99)} + {rng.randint(1000000, 9999999)}",
    ])  # fmt: skip
    carrier = rng.choice(TEMPLATES[language]["near"]).replace("{{", "\0").replace("}}", "\1")
    return Sentence(language, carrier.replace("{}", value).replace("\0", "{").replace("\1", "}"), None)


def _main() -> Iterator[str]:
    yield table()
    if "--errors" in sys.argv:
        yield from scores(privacy_set())[2]


if __name__ == "__main__":
    for line in _main():
        print(line)
