"""Explanations of latents with scores: a client names what a latent reads, then has to use that name.

    explain(Index("runs/demo-index"), OfflineClient(), "sae_attn_mid", [3, 40])

Detection (Paulo et al. 2024, "Automatically interpreting millions of features in large language models"): from the
label alone, in which texts does the latent fire? Fuzzing: are the marked tokens the ones it fires on? Scores are
balanced accuracies: 0.5 is chance. The label is written from the strongest examples; both tests use examples drawn
from all quarters of the latent's firings, and never one that the label was written from.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qwenscope.errors import FormatError
from qwenscope.features.clients import Client
from qwenscope.features.describing import BANDS
from qwenscope.features.store import Index, add_explanations, read_explanations
from qwenscope.files import whole_folder

SHOWN = 12
TESTED = 10
MARK_ABOVE = 0.3
"""Tokens above this share of the example's strongest activation are marked."""
LABEL_LIMIT = 300
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


def explain(
    index: Index,
    client: Client,
    sae_id: str,
    latents: Sequence[int],
    *,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Label latents, score the labels, and store both in the index, where search finds them.

    Args:
        index: an index.
        client: who writes.
        sae_id: which SAE.
        latents: which latents; those that never fired are passed over.
        on_progress: called with (phase, done, total).

    Returns:
        Records {"sae", "latent", "label", "client", "detection", "fuzzing", "samples"}; a score is None where the
        index has too few examples. `samples` are delphi's: {"str_tokens", "activations", "distance", "activating",
        "prediction", "probability", "correct"}; an answer that is no list of numbers counts as wrong.

    Raises:
        FormatError: no such SAE or latent.
        HubError: the client's endpoint fails.
    """
    records = []
    for done, latent in enumerate(latents, start=1):
        found = index.latent(sae_id, latent)
        if found["fired"]:
            record = _explain_one(client, found)
            add_explanations(index, [(sae_id, latent, record)])  # one by one: an endpoint may fail half-way
            records.append({"sae": sae_id, "latent": latent, **record})
        if on_progress is not None:
            on_progress("explaining", done, len(latents))
    return records


def export_delphi(index: Index, out: Path) -> int:
    """Write all explanations the way delphi does: explanations/, scores/detection/, scores/fuzz/, one file per latent.

    Returns:
        The number of latents written.

    Raises:
        FormatError: there are no explanations, or `out` is not empty.
    """
    records = list(read_explanations(index))
    if not records:
        raise FormatError(f"{index.folder} holds no explanations; write some with `qwenscope explain`")
    with whole_folder(out) as folder:
        for name in ("explanations", "scores/detection", "scores/fuzz"):
            (folder / name).mkdir(parents=True)
        for sae_id, latent, record in records:
            file = f"{sae_id}_latent{latent}.txt"
            (folder / "explanations" / file).write_text(json.dumps(record["label"], ensure_ascii=False))
            for score, name in (("detection", "detection"), ("fuzzing", "fuzz")):
                samples = json.dumps(record["samples"][score], ensure_ascii=False)
                (folder / "scores" / name / file).write_text(samples)
    return len(records)


def _explain_one(client: Client, found: dict[str, Any]) -> dict[str, Any]:
    top = [example for example in found["examples"] if example["kind"] == "top"][:SHOWN]
    shown = {(example["conversation"], example["position"]) for example in top}
    firing = [
        example
        for example in found["examples"]
        if example["kind"] in BANDS and (example["conversation"], example["position"]) not in shown
    ]
    quiet = [example for example in found["examples"] if example["kind"] == "negative"]
    choose = random.Random(found["latent"])
    answer = client.complete(_EXPLAIN, _numbered(_marked(example, _active(example)) for example in top), 64)
    label = _label(answer)
    samples = {
        "detection": _detection(client, label, firing, quiet, choose),
        "fuzzing": _fuzzing(client, label, firing, choose),
    }
    scores = {name: balanced_accuracy(found) for name, found in samples.items()}
    return {"label": label, "client": client.name, **scores, "samples": samples}


def _label(answer: str) -> str:
    """An answer on one line, out of its quotation marks."""
    line = " ".join(answer.split())
    if len(line) > 1 and line[0] == line[-1] == '"':
        line = line[1:-1]
    return line[:LABEL_LIMIT].strip() or "no label"


def balanced_accuracy(samples: Sequence[dict[str, Any]]) -> float | None:
    """Mean of the accuracies on activating and on other samples; None if either kind is missing."""
    shares: list[float] = []
    for activating in (True, False):
        correct = [sample["correct"] for sample in samples if sample["activating"] is activating]
        if not correct:
            return None
        shares.append(sum(correct) / len(correct))
    return sum(shares) / 2


def _detection(
    client: Client, label: str, firing: list[dict[str, Any]], quiet: list[dict[str, Any]], choose: random.Random
) -> list[dict[str, Any]]:
    asked = [(example, True) for example in _spread(firing)] + [(example, False) for example in quiet[:TESTED]]
    choose.shuffle(asked)
    texts = ["".join(example["tokens"]) for example, _ in asked]
    return _ask(client, _DETECT, label, texts, asked)


def _fuzzing(client: Client, label: str, firing: list[dict[str, Any]], choose: random.Random) -> list[dict[str, Any]]:
    """Half of the examples are marked where the latent fires, half at as many other tokens."""
    chosen = _spread(firing)
    asked, texts = [], []
    for number, example in enumerate(chosen):
        places, right = _active(example), number % 2 == 0
        silent = [place for place, value in enumerate(example["activations"]) if value == 0]
        if not right:
            if not silent:
                continue
            places = set(choose.sample(silent, min(len(places), len(silent))))
        asked.append((example, right))
        texts.append(_marked(example, places))
    return _ask(client, _FUZZ, label, texts, asked)


def _ask(
    client: Client, system: str, label: str, texts: list[str], asked: list[tuple[dict[str, Any], bool]]
) -> list[dict[str, Any]]:
    if not texts:
        return []
    answer = client.complete(system, f"Feature: {label}\n\n{_numbered(texts)}", 16 + 4 * len(texts))
    samples = []
    for (example, activating), prediction in zip(asked, _parse(answer, len(texts)), strict=True):
        band = BANDS.index(example["kind"]) if example["kind"] in BANDS else -1
        samples.append(
            {
                "str_tokens": example["tokens"],
                "activations": example["activations"],
                "distance": band,
                "activating": activating,
                "prediction": prediction,
                "probability": None,
                "correct": prediction is activating,
            }
        )
    return samples


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


def _active(example: dict[str, Any]) -> set[int]:
    most = max(example["activations"])
    return {place for place, value in enumerate(example["activations"]) if value > 0 and value >= MARK_ABOVE * most}


def _marked(example: dict[str, Any], places: set[int]) -> str:
    return "".join(f"<<{text}>>" if place in places else text for place, text in enumerate(example["tokens"]))


def _numbered(texts: Iterable[str]) -> str:
    return "\n\n".join(f"Text {number}:\n{text}" for number, text in enumerate(texts, start=1))
