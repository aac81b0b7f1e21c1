"""Evaluate a run, a release or any suite: held-out conversations in, evaluation.json and report.html out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenscope.checksums import read_checksums, write_checksums
from qwenscope.corpus.conversation import Conversation
from qwenscope.errors import FormatError, ModelError
from qwenscope.evaluation.l0_proxies import decoder_pairwise_cosine
from qwenscope.evaluation.measure import SplitMeasurement
from qwenscope.evaluation.meters import Meters
from qwenscope.evaluation.pairs import BOOTSTRAP, compare_split, find_pairs, overlap
from qwenscope.evaluation.report import report_html
from qwenscope.evaluation.usefulness import labelled_usefulness, usefulness
from qwenscope.evaluation.work import OnProgress
from qwenscope.files import disk_errors_named, fsync_folder, make_folder, write_json, write_text
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target, open_target
from qwenscope.sae.activation import described
from qwenscope.sae.sae import SAE


def evaluate(
    target: Path | str,
    *,
    data: Path | None = None,
    tokens: int | None = None,
    until_interval: float | None = None,
    probing: bool = False,
    tasks: Path | None = None,
    out: Path | None = None,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Measure every SAE of `target` on each split and write `evaluation.json` and `report.html`.

    On `data` without an `out`, these are `evaluation-NAME.json` and `report-NAME.html`, so that what was measured on
    held-out conversations stays; a suite without such keeps the plain names. In a release, checksums are verified
    before and listed anew after; its card keeps the numbers it was written with.

    Args:
        target: what `open_target` takes.
        data: .parquet, .jsonl or .jsonl.gz file, or a folder of them, to measure on; None takes the conversations
            that the recipe holds out from training.
        tokens: tokens per split at most; None takes the recipe's.
        until_interval: no more than make the 95 % intervals of FVU and CE recovered so narrow, for every SAE.
        probing: measure usefulness too: what a few latents say of a token's labels, beside controls.
        tasks: the same for the `labels` that the rows of this file or folder state.
        on_progress: called with (phase, tokens done, tokens in all); a phase's name says how long it will take.
        out: folder to write to; None takes the target's own.

    Returns:
        The object in `evaluation.json`; docs/evaluation.md defines each number. A split without
        conversations is absent.

    Raises:
        FormatError, HubError: as `open_target`; or `target` is on the Hub and there is no `out`.
        ModelError: the language model cannot be loaded, or does not have the hook points. Or figures are not finite:
            the others are written, these are null.
        CorpusError: no conversations, or too few to measure or to probe.
        ResourceError: the files cannot be written.
    """
    opened = open_target(target)
    folder, name = _where(opened, data, out)
    lm = opened.language_model()
    budget = tokens if tokens is not None else opened.recipe.evaluation.tokens
    splits = opened.splits(lm.tokenizer, budget, data)
    probed = usefulness(opened, lm, splits, on_progress) if probing else {}
    if tasks is not None:
        probed |= labelled_usefulness(opened, lm, tasks, on_progress)
    splits, measured = Meters(opened, lm, on_progress).measured(splits, until_interval)
    described = {
        "origin": "held out by the recipe" if data is None else data.name,
        "tokens_per_split_at_most": budget,
        "until_interval": until_interval,
        "splits": counts(splits),
    }
    odd: list[str] = []
    result: dict[str, Any] = _finite(_result(opened, lm, measured, described) | probed, "", odd)
    with disk_errors_named(folder):
        written = _publish(folder, name, result, opened.folder)
    _refuse(odd, lm.name, written)
    return result


def _where(opened: Target, data: Path | None, out: Path | None) -> tuple[Path, str]:
    """The folder to write to, and what is put to the names there."""
    if opened.on_hub and out is None:
        raise FormatError(f"{opened.name} is on the Hub; say with --out where its evaluation is written")
    beside = data is not None and out is None and opened.own_recipe
    return out or opened.folder, f"-{data.resolve().name.split('.')[0]}" if data is not None and beside else ""


def target_of(sae: SAE) -> dict[str, str]:
    """The key `target` of a transcoder."""
    return {"target": sae.config["target"]} if "target" in sae.config else {}


def _refuse(odd: list[str], model: str, written: Path) -> None:
    """ModelError where a figure of an SAE is not finite; a comparison may lack a value in honest data."""
    odd = [name for name in odd if name.startswith("saes/")]
    if odd:
        named = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        raise ModelError(
            f"logits or rows of {model} are not finite, with or without an SAE in it: {named} are null in {written}; "
            "try lm.dtype: float32"
        )


def _publish(folder: Path, name: str, result: Mapping[str, Any], run: Path) -> Path:
    """Write the measurement, then its page: ended at any instant, no page stands beside numbers of another measurement,
    and a release lists none but whole files. Returns the measurement's path."""
    evaluation, report = folder / f"evaluation{name}.json", folder / f"report{name}.html"
    make_folder(folder)
    listed = read_checksums(folder)  # of a release
    if listed is not None:
        write_checksums(folder, only=listed.keys() - {evaluation.name, report.name})
    if report.exists():
        report.unlink()
        fsync_folder(folder)
    write_json(evaluation, result)
    write_text(report, report_html(result, run))
    if listed is not None:
        write_checksums(folder)
    return evaluation


def _finite(value: Any, name: str, odd: list[str]) -> Any:
    """JSON has no NaN: a number that is not finite becomes null, and its name goes to `odd`."""
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{name}/{key}".strip("/"), odd) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, name, odd) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        odd.append(name)
        return None
    return value


def fired(measured: Mapping[str, SplitMeasurement], sae_id: str) -> Tensor:
    """int64 [N], on how many tokens of all splits each latent fired."""
    return sum((found.fired_N[sae_id] for found in measured.values()), start=torch.zeros((), dtype=torch.int64))


def _result(
    target: Target, lm: LanguageModel, measured: Mapping[str, SplitMeasurement], data: dict[str, Any]
) -> dict[str, Any]:
    """The object in evaluation.json."""
    return {
        "qwenscope": version("qwenscope"),
        "language_model": {"name": lm.name, "revision": lm.revision, "dtype": str(lm.dtype).removeprefix("torch.")},
        "data": data,
        "hook_points": {
            sae_id: {
                **site.described(),
                **target_of(target.saes[sae_id]),
                "kind": lm.layer_kinds[site.layer],
                "dict_size": target.saes[sae_id].dict_size,
                "k": target.saes[sae_id].k,
                **described(target.saes[sae_id].activation.name),
            }
            for sae_id, site in target.sites.items()
        },
        "saes": {sae_id: {split: found.figures[sae_id] for split, found in measured.items()} for sae_id in target.saes},
        "dead": {sae_id: _dead(sae_id, measured) for sae_id in target.saes},
        "decoder_pairwise_cosine": {sae_id: decoder_pairwise_cosine(sae) for sae_id, sae in target.saes.items()},
        "comparison": _comparison(target, measured),
    }


def counts(splits: Mapping[str, list[Conversation]]) -> dict[str, dict[str, int]]:
    """How much was measured of each split."""
    return {
        split: {"conversations": len(found), "tokens": sum(len(each.token_ids) for each in found)}
        for split, found in splits.items()
    }


def _dead(sae_id: str, measured: Mapping[str, SplitMeasurement]) -> dict[str, Any]:
    """Latents that fired in no split, and in how many tokens that is."""
    fired_N = fired(measured, sae_id)
    tokens = sum(found.figures[sae_id]["tokens"] for found in measured.values())
    dead = int((fired_N == 0).sum())
    return {"tokens": tokens, "dead_latents": dead, "dead_fraction": dead / len(fired_N)}


def _comparison(target: Target, measured: Mapping[str, SplitMeasurement]) -> dict[str, Any]:
    """The `comparison` of evaluation.json: pairs with their overlap, intervals and differences, shifts downstream."""
    saes, seed = target.saes, target.recipe.seed
    pairs = find_pairs(target.recipe.hook_points)
    alive = {sae_id: fired(measured, sae_id) > 0 for sae_id in saes}
    return {
        "bootstrap": BOOTSTRAP,
        "pairs": [
            {
                "kind": pair.kind,
                "first": pair.first,
                "second": pair.second,
                "layers": [target.sites[pair.first].layer, target.sites[pair.second].layer],
                "overlap": overlap(saes[pair.first], saes[pair.second], alive[pair.first], alive[pair.second], seed),
            }
            for pair in pairs
        ],
        "splits": {split: compare_split(pairs, found.sums, seed) for split, found in measured.items()},
        "routing": {split: found.routing for split, found in measured.items() if found.routing},
        "recurrent_state": {split: found.states for split, found in measured.items() if found.states},
    }
