"""Evaluate a run or a release: held-out conversations in, evaluation.json and report.html out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qwenscope.checksums import CHECKSUMS_FILE, verify_folder, write_checksums
from qwenscope.corpus.chat import Conversation
from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import CorpusError, FormatError
from qwenscope.evaluation.measure import SplitMeasurement, SplitMeter
from qwenscope.evaluation.pairs import BOOTSTRAP_SAMPLES, LEVEL, compare_split, find_pairs, overlap
from qwenscope.evaluation.report import report_html
from qwenscope.files import read_json, write_json, write_text
from qwenscope.lm.load import LanguageModel, check_hook_points, load_language_model
from qwenscope.recipe import Recipe, SourceRecipe, load_recipe
from qwenscope.sae.topk import TopKSAE

logger = logging.getLogger(__name__)

SPLITS = ("chat", "tool_use")
PATIENCE = 10  # times a split's tokens that are read of an endless stream before what is rare there is given up


@dataclass(frozen=True)
class Target:
    """What is evaluated: a run or release folder, its recipe, its SAEs, and the revisions that it was made with."""

    folder: Path
    recipe: Recipe
    saes: dict[str, TopKSAE]
    revisions: Mapping[str, Any]


def evaluate(target: Path | str, *, data: Path | None = None, tokens: int | None = None) -> dict[str, Any]:
    """Measure every SAE of `target` on each split and write `evaluation.json` and `report.html` into it.

    In a release, checksums are verified before and listed anew after; its card keeps the numbers it was written with.

    Args:
        target: run folder (complete) or release folder.
        data: .parquet, .jsonl or .jsonl.gz file, or a folder of them, to measure on; None takes the conversations
            that the recipe holds out from training.
        tokens: tokens per split at most; None takes the recipe's.

    Returns:
        The object in `evaluation.json`; docs/evaluation.md defines each number. A split without
        conversations is absent.

    Raises:
        FormatError: `target` is no complete run or release, or an SAE does not fit its recipe or the model.
        ModelError: the language model cannot be loaded, or does not have the hook points.
        CorpusError: no conversations, or too few to measure.
    """
    opened = open_target(Path(target))
    recipe = opened.recipe
    budget = tokens if tokens is not None else recipe.evaluation.tokens
    revision = opened.revisions.get("model") or recipe.lm.revision
    lm = load_language_model(recipe.lm.model_copy(update={"revision": revision}), lm_head=True)
    check_hook_points(lm, recipe.hook_points)
    _check_sizes(opened, lm)
    splits = held_out_conversations(opened, lm, data, budget)
    saes = {sae_id: sae.to(lm.device).eval() for sae_id, sae in opened.saes.items()}
    layers = {sae_id: point.layer for sae_id, point in recipe.hook_points.items()}
    measured = {}
    for split, conversations in splits.items():
        logger.info("measuring %d SAEs on %d conversations of %s", len(saes), len(conversations), split)
        measured[split] = SplitMeter(lm, saes, layers, conversations, recipe).run()
    result = {
        "qwenscope": version("qwenscope"),
        "language_model": {"name": lm.name, "revision": lm.revision, "dtype": str(lm.dtype).removeprefix("torch.")},
        "data": _describe_data(splits, data, budget),
        "hook_points": {
            sae_id: {"layer": point.layer, "kind": lm.layer_kinds[point.layer], "dict_size": sae.dict_size, "k": sae.k}
            for (sae_id, point), sae in zip(recipe.hook_points.items(), saes.values(), strict=True)
        },
        "saes": {sae_id: {split: found.figures[sae_id] for split, found in measured.items()} for sae_id in saes},
        "dead": {sae_id: _dead(sae_id, measured) for sae_id in saes},
        "comparison": compare(recipe, saes, measured),
    }
    page = report_html(result, opened.folder)
    write_json(opened.folder / "evaluation.json", result)
    write_text(opened.folder / "report.html", page)
    if (opened.folder / CHECKSUMS_FILE).is_file():  # a release: list the new files
        write_checksums(opened.folder)
    return result


def open_target(folder: Path) -> Target:
    """Read a run or release folder.

    Raises:
        FormatError: it is neither, it is a run that is not complete, or an SAE is missing or damaged.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder} is not a folder; give a run or a release")
    if not (folder / "recipe.yaml").is_file():
        raise FormatError(f"{folder} holds no recipe.yaml; give a run or a release made by qwenscope")
    if (folder / CHECKSUMS_FILE).is_file():
        verify_folder(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    is_run = (folder / "status.json").is_file() or (folder / "saes").is_dir()
    if is_run and not (folder / "saes").is_dir():
        raise FormatError(f"{folder} is a run without saes/: it is not complete; finish it with `train --resume`")
    root = folder / "saes" if is_run else folder
    saes = {sae_id: TopKSAE.from_pretrained(root, sae_id) for sae_id in recipe.hook_points}
    for sae_id, point in recipe.hook_points.items():
        if (saes[sae_id].dict_size, saes[sae_id].k) != (point.dict_size, point.k):
            raise FormatError(
                f"{root / sae_id} has dict_size {saes[sae_id].dict_size} and k {saes[sae_id].k}; recipe.yaml says "
                f"{point.dict_size} and {point.k}"
            )
    run = folder / "run.json"
    revisions = read_json(run).get("revisions") if run.is_file() else None
    return Target(folder, recipe, saes, revisions or {})


def _check_sizes(target: Target, lm: LanguageModel) -> None:
    for sae_id, sae in target.saes.items():
        if sae.hidden_dim != lm.hidden_dim:
            raise FormatError(f"{sae_id} has hidden_dim {sae.hidden_dim}; {lm.name} has {lm.hidden_dim}")


def held_out_conversations(
    target: Target, lm: LanguageModel, data: Path | None, tokens: int
) -> dict[str, list[Conversation]]:
    """Conversations of each split that has any, `tokens` tokens at most (the last conversation is cut to fit).

    Raises:
        CorpusError: there are none, or a source is missing or damaged.
    """
    corpus, revisions = target.recipe.corpus, target.revisions.get("corpus")
    if data is not None:
        # All of the file: a conversation counts as held out if its hash falls in the held-out share.
        sources = (SourceRecipe(name="files", weight=1.0, path=data),)
        corpus, revisions = corpus.model_copy(update={"sources": sources, "held_out_share": 1.0}), None
    stream = CorpusStream(corpus, lm.tokenizer, seed=target.recipe.seed, held_out=True, revisions=revisions)
    try:
        splits = fill_splits(stream, tokens, limit=PATIENCE * tokens if data is None else None)
    finally:
        stream.close()
    if not splits:
        origin = data if data is not None else "the recipe's held-out conversations"
        raise CorpusError(f"{origin}: no conversation to measure on; give --data, or raise corpus.held_out_share")
    return splits


def fill_splits(
    stream: Iterable[Conversation], tokens: int, *, limit: int | None = None
) -> dict[str, list[Conversation]]:
    """Deal conversations into splits until each has `tokens` tokens, the stream ends, or `limit` tokens were read."""
    splits: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    room = dict.fromkeys(SPLITS, tokens)
    read = 0
    for conversation in stream:
        read += len(conversation.token_ids)
        if left := room[conversation.split]:
            length = min(left, len(conversation.token_ids))
            room[conversation.split] -= length
            splits[conversation.split].append(_cut(conversation, length))
        if not any(room.values()) or (limit is not None and read >= limit):
            break
    return {split: conversations for split, conversations in splits.items() if conversations}


def _cut(conversation: Conversation, length: int) -> Conversation:
    if length == len(conversation.token_ids):
        return conversation
    token_ids, roles = conversation.token_ids[:length], conversation.roles[:length]
    return dataclasses.replace(conversation, token_ids=token_ids, roles=roles, truncated=True)


def _describe_data(splits: Mapping[str, list[Conversation]], data: Path | None, budget: int) -> dict[str, Any]:
    return {
        "origin": "held out by the recipe" if data is None else data.name,
        "tokens_per_split_at_most": budget,
        "splits": {
            split: {
                "conversations": len(conversations),
                "tokens": sum(len(conversation.token_ids) for conversation in conversations),
            }
            for split, conversations in splits.items()
        },
    }


def _dead(sae_id: str, measured: Mapping[str, SplitMeasurement]) -> dict[str, Any]:
    """Latents that fired in no split, and in how many tokens that is."""
    fired_N = sum((found.fired_N[sae_id] for found in measured.values()), start=torch.zeros((), dtype=torch.int64))
    tokens = sum(found.figures[sae_id]["tokens"] for found in measured.values())
    dead = int((fired_N == 0).sum())
    return {"tokens": tokens, "dead_latents": dead, "dead_fraction": dead / len(fired_N)}


def compare(recipe: Recipe, saes: Mapping[str, TopKSAE], measured: Mapping[str, SplitMeasurement]) -> dict[str, Any]:
    """The `comparison` of evaluation.json: pairs with their overlap, intervals and differences, shifts downstream."""
    pairs = find_pairs(recipe.hook_points)
    alive = {
        sae_id: sum((found.fired_N[sae_id] for found in measured.values()), start=torch.zeros(())) > 0
        for sae_id in saes
    }
    return {
        "bootstrap": {"samples": BOOTSTRAP_SAMPLES, "level": LEVEL, "unit": "conversation"},
        "pairs": [
            {
                "kind": pair.kind,
                "first": pair.first,
                "second": pair.second,
                "layers": [recipe.hook_points[pair.first].layer, recipe.hook_points[pair.second].layer],
                "overlap": overlap(
                    saes[pair.first], saes[pair.second], alive[pair.first], alive[pair.second], recipe.seed
                ),
            }
            for pair in pairs
        ],
        "splits": {split: compare_split(pairs, found.sums, recipe.seed) for split, found in measured.items()},
        "routing": {split: found.routing for split, found in measured.items() if found.routing},
        "recurrent_state": {split: found.states for split, found in measured.items() if found.states},
    }
