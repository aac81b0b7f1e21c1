"""Explanations of latents with scores: a client names what a latent reads, then has to use that name.

    explain(Index("runs/demo-index"), OfflineClient(), "sae_attn_mid", [3, 40])

Detection (Paulo et al. 2024, "Automatically interpreting millions of features in large language models"): from the
label alone, in which texts does the latent fire? Fuzzing: are the marked tokens the ones it fires on? Scores are
balanced accuracies: 0.5 is chance. The label is written from the strongest examples; both tests use examples drawn
from all quarters of the latent's firings, and never one that shares a token of the corpus, or its whole text, with one
that the label was written from.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from qwenscope.errors import FormatError
from qwenscope.features.clients import Client
from qwenscope.features.describe import BANDS
from qwenscope.features.store import Index, explaining, read_explanations
from qwenscope.files import whole_folder, write_json

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
        "prediction", "probability", "correct"}, the last three None where there was no answer to parse: that counts as
        wrong here; delphi leaves such samples out.

    Raises:
        FormatError: no such SAE or latent.
        HubError: the client's endpoint fails.
    """
    records = []
    with explaining(index) as add:
        for done, latent in enumerate(latents, start=1):
            found = index.latent(sae_id, latent)
            if found["fired"]:
                record = _explain_one(client, found)
                add(sae_id, latent, record)  # one by one: an endpoint may fail half-way
                records.append({"sae": sae_id, "latent": latent, **record})
            if on_progress is not None:
                on_progress("explaining", done, len(latents))
    return records


def export_delphi(index: Index, out: Path) -> int:
    """Write all explanations as a results folder of delphi (eai-delphi 0.1), which its analysis reads.

    explanations/, scores/detection/ and scores/fuzz/ hold a file per latent, log/hookpoint_firing_counts.pt how often
    each latent fired, run_config.json the hook points. These are named layers.22.sae_delta_mid: delphi finds a hook
    point's files by a part of their name, and sae_delta_mid alone is a part of sae_delta_mid_pos1.

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
            file = f"{_hook_point(index, sae_id)}_latent{latent}.txt"
            (folder / "explanations" / file).write_text(json.dumps(record["label"], ensure_ascii=False), "utf-8")
            for score, name in (("detection", "detection"), ("fuzzing", "fuzz")):
                if record[score] is not None:
                    samples = json.dumps(record["samples"][score], ensure_ascii=False)
                    (folder / "scores" / name / file).write_text(samples, "utf-8")
        names = {sae_id: _hook_point(index, sae_id) for sae_id in sorted({sae_id for sae_id, _, _ in records})}
        (folder / "log").mkdir()
        torch.save({name: _fired(index, id) for id, name in names.items()}, folder / "log/hookpoint_firing_counts.pt")
        write_json(folder / "run_config.json", {"hookpoints": list(names.values())})
    return len(records)


def _hook_point(index: Index, sae_id: str) -> str:
    return f"layers.{index.saes[sae_id]['layer']}.{sae_id}"


def _fired(index: Index, sae_id: str) -> torch.Tensor:
    """int64 [N], tokens on which each latent fired."""
    shares_N = torch.tensor(index.table(sae_id)["density"], dtype=torch.float64)
    fired_N: torch.Tensor = (shares_N * index.saes[sae_id]["tokens"]).round().long()
    return fired_N


def _explain_one(client: Client, found: dict[str, Any]) -> dict[str, Any]:
    # One text opens many conversations: none is shown twice.
    distinct = {_text(example): example for example in reversed(found["examples"]) if example["kind"] == "top"}
    top = list(reversed(distinct.values()))[:SHOWN]
    unseen = [example for example in found["examples"] if not any(_overlap(example, shown) for shown in top)]
    firing = [example for example in unseen if example["kind"] in BANDS]
    firing = firing or [example for example in unseen if example["kind"] == "top"]  # of a latent that rarely fires
    quiet = [example for example in unseen if example["kind"] == "negative"]
    choose = random.Random(found["latent"])
    label = _label(_answer(client, _EXPLAIN, _numbered(_marked(example, _active(example)) for example in top), 64))
    samples = {
        "detection": _detection(client, label, firing, quiet, choose),
        "fuzzing": _fuzzing(client, label, firing, choose),
    }
    scores = {name: balanced_accuracy(found) for name, found in samples.items()}
    return {"label": label, "client": client.name, **scores, "samples": samples}


def _answer(client: Client, system: str, user: str, max_tokens: int) -> str:
    """What a client says after it has thought."""
    return client.complete(system, user, max_tokens).rpartition("</think>")[2]


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
        correct = [sample["correct"] is True for sample in samples if sample["activating"] is activating]
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
