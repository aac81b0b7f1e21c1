"""What a client is asked about one latent, and what its answers are worth.

Detection (Paulo et al. 2024, "Automatically interpreting millions of features in large language models"): from the
label alone, in which texts does the latent fire? Fuzzing: are the marked tokens the ones it fires on? Scores are
balanced accuracies: 0.5 is chance. The label is written from the strongest examples; both tests use examples drawn
from all quarters of the latent's firings, and never one that shares a token of the corpus, or its whole text, with one
that the label was written from.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from typing import Any

from qwenscope.features.clients import Client
from qwenscope.features.describe import BANDS

SHOWN = 12
TESTED = 10
MARK_ABOVE = 0.3
"""Tokens above this share of the example's strongest activation are marked."""
LABEL_LIMIT = 300
_DISTANCE = {"negative": -1, "top": 0} | {band: number for number, band in enumerate(BANDS)}
_EXPLAIN = (
    "You name what a feature of a language model reads. In each text the tokens that it responds to stand between << "
    "and >>. Answer with one short phrase, nothing else: what do the marked tokens, in their contexts, have in common?"
)
_DETECT = (
    "You are given the description of a feature of a language model and numbered texts. Answer with a JSON list of one "
    "number per text, nothing else: 1 if the text contains what the feature responds to, 0 if not."
)
_FUZZ = (
    "You are given the description of a feature of a language model and numbered texts with tokens between << and >>. "
    "Answer with a JSON list of one number per text, nothing else: 1 if the marked tokens are what the feature "
    "responds to, 0 if not."
)


def ask_about(client: Client, found: dict[str, Any]) -> dict[str, Any]:
    """Have a client name a latent and use the name: {"label", "client", "detection", "fuzzing", "unparsed", "samples"}.

    Args:
        client: who writes.
        found: the latent's page, as `Index.latent` gives it.
    """
    # One text opens many conversations: none is shown twice.
    distinct = {_text(example): example for example in reversed(found["examples"]) if example["kind"] == "top"}
    top = list(reversed(distinct.values()))[:SHOWN]
    unseen = [example for example in found["examples"] if not any(_overlap(example, shown) for shown in top)]
    firing = [example for example in unseen if example["kind"] in BANDS]
    firing = firing or [example for example in unseen if example["kind"] == "top"]  # of a latent that rarely fires
    quiet = [example for example in unseen if example["kind"] == "negative"]
    choose = random.Random(found["latent"])
    label = _label(_answer(client, _EXPLAIN, _numbered(_marked(example, _active(example)) for example in top), 64))
    samples: dict[str, list[dict[str, Any]]] = {}
    if label:
        samples["detection"] = _detection(client, label, firing, quiet, choose)
        samples["fuzzing"] = _fuzzing(client, label, firing, choose)
    unparsed = [name for name, asked in samples.items() if asked and asked[0]["prediction"] is None]
    return {
        "label": label,
        "client": client.name,
        **{name: balanced_accuracy(samples.get(name, ())) for name in ("detection", "fuzzing")},
        "unparsed": unparsed if label else ["label"],
        "samples": samples,
    }


def _answer(client: Client, system: str, user: str, max_tokens: int) -> str:
    """What a client says after it has thought."""
    return client.complete(system, user, max_tokens).rpartition("</think>")[2]


def _label(answer: str) -> str:
    """An answer on one line, out of its quotation marks; empty if it names nothing."""
    line = " ".join(answer.split())
    if len(line) > 1 and line[0] == line[-1] == '"':
        line = line[1:-1]
    return line[:LABEL_LIMIT].strip()


def balanced_accuracy(samples: Sequence[dict[str, Any]]) -> float | None:
    """Mean of the accuracies on activating and on other samples, of those that were answered; None if either kind is
    missing."""
    shares: list[float] = []
    for activating in (True, False):
        correct = [each["correct"] for each in samples if each["activating"] is activating]
        correct = [right for right in correct if right is not None]
        if not correct:
            return None
        shares.append(sum(correct) / len(correct))
    return sum(shares) / 2


def _detection(
    client: Client, label: str, firing: list[dict[str, Any]], quiet: list[dict[str, Any]], choose: random.Random
) -> list[dict[str, Any]]:
    asked = [(example, True, _text(example)) for example in _spread(firing)]
    asked += [(example, False, _text(example)) for example in quiet[:TESTED]]
    choose.shuffle(asked)
    return _ask(client, _DETECT, label, asked)


def _fuzzing(client: Client, label: str, firing: list[dict[str, Any]], choose: random.Random) -> list[dict[str, Any]]:
    """Half of the examples are marked where the latent fires, half at as many other tokens."""
    asked = []
    for number, example in enumerate(_spread(firing)):
        places, right = _active(example), number % 2 == 0
        if not right:
            values = zip(example["tokens"], example["activations"], strict=True)
            silent = [place for place, (text, value) in enumerate(values) if text and value == 0]
            places = set(choose.sample(silent, min(len(places), len(silent))))
        if places:
            asked.append((example, right, _marked(example, places)))
    choose.shuffle(asked)
    return _ask(client, _FUZZ, label, asked)


def _ask(
    client: Client, system: str, label: str, asked: list[tuple[dict[str, Any], bool, str]]
) -> list[dict[str, Any]]:
    """Ask about (example, right answer, text as it is shown); the samples in delphi's form."""
    if not asked:
        return []
    user = f"Feature: {label}\n\n{_numbered(text for _, _, text in asked)}"
    answer = _answer(client, system, user, 16 + 4 * len(asked))
    return [
        {
            "str_tokens": example["tokens"],
            "activations": example["activations"],
            "distance": _DISTANCE[example["kind"]],
            "activating": activating,
            "prediction": prediction,
            "probability": None,
            "correct": None if prediction is None else prediction is activating,
        }
        for (example, activating, _), prediction in zip(asked, _parse(answer, len(asked)), strict=True)
    ]


def _parse(answer: str, count: int) -> list[bool | None]:
    """The first list of `count` zeros and ones in an answer; all None if there is none."""
    for text in re.findall(r"\[[\s01,]*\]", answer):
        numbers = re.findall(r"[01]", text)
        if len(numbers) == count:
            return [number == "1" for number in numbers]
    return [None] * count


def _spread(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Up to TESTED of the examples, evenly from the first to the last."""
    step = max(1.0, len(examples) / TESTED)
    return [examples[int(i * step)] for i in range(min(TESTED, len(examples)))]


def _text(example: dict[str, Any]) -> str:
    return "".join(example["tokens"])


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether one knows of the other: windows of a conversation that share tokens, or one text within the other."""
    if one["conversation"] == other["conversation"]:
        (first, length), (second, _) = sorted((e["position"] - e["peak"], len(e["tokens"])) for e in (one, other))
        if first + length > second:
            return True
    text, longer = sorted((_text(one), _text(other)), key=len)
    return text in longer


def _active(example: dict[str, Any]) -> set[int]:
    """Tokens to mark; of a character that several tokens write, the first, where its text stands."""
    most, first, places = max(example["activations"]), 0, set()
    for place, (text, value) in enumerate(zip(example["tokens"], example["activations"], strict=True)):
        first = place if text else first
        if value > 0 and value >= MARK_ABOVE * most:
            places.add(first)
    return places


def _marked(example: dict[str, Any], places: set[int]) -> str:
    return "".join(f"<<{text}>>" if place in places else text for place, text in enumerate(example["tokens"]))


def _numbered(texts: Iterable[str]) -> str:
    return "\n\n".join(f"Text {number}:\n{text}" for number, text in enumerate(texts, start=1))
