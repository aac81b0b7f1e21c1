"""Whether latents are of use, which a low error does not say: how well a few of them tell labels apart (sparse probing,
Gurnee et al. 2023, arXiv 2305.01610), beside rows as they are, an SAE whose decoder was never trained, random
directions and the tokens themselves. docs/evaluation.md defines each number.

    from qwenscope.evaluation.usefulness import usefulness

Legend: R rows (tokens), D hidden, N latents, F any features, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from qwenscope.activations.harvest import harvest
from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.given import RowReader
from qwenscope.errors import CorpusError
from qwenscope.evaluation.baselines import directions, frozen_decoder_sae
from qwenscope.evaluation.token_labels import Categories, binary, categories, joined, stated
from qwenscope.evaluation.work import OnProgress
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.opening import Target
from qwenscope.recipe import Recipe
from qwenscope.sae.sae import SAE
from qwenscope.seeds import derive_seed

CONVERSATIONS, LABELLED, ROWS_EACH = 64, 256, 48
"""How many held-out ones are looked at, how many of a labelled file, and at most so many tokens of each."""
SEEDS = 3
"""Each divides the conversations anew, and draws another frozen decoder and other directions."""
LATENTS = (1, 4, 16)
"""How many latents a probe may use."""
FEWEST = 20
"""Rows that a label and its absence have, among those learnt from and among those held out."""
HELD_OUT = 0.3
DENSE = 0.1
"""A latent that fires on more tokens is dense."""

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Rows with what is known of their tokens."""

    rows: Mapping[Site, Tensor]
    """[R, D]."""
    conversation_R: NDArray[np.int64]
    token_R: NDArray[np.int64]
    categories: Categories
    """[R] each."""


@dataclass(frozen=True)
class Task:
    """One label: which rows have it, and which are learnt from and held out, none of the same conversation."""

    family: str
    positive_R: Mask
    train_R: Mask
    held_R: Mask


def usefulness(
    target: Target,
    lm: LanguageModel,
    splits: Mapping[str, Sequence[Conversation]],
    on_progress: OnProgress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Sparse probing of every SAE, its dense latents, and how far from centred its rows are.

    Args:
        target: the SAEs, their sites, which rows are left out, and the seed.
        lm: its language model, at least up to the last site.
        splits: held-out conversations; an equal part of each split is looked at.
        on_progress: called with (phase, SAEs done, SAEs in all).

    Returns:
        {"usefulness": ...}, a part of evaluation.json.

    Raises:
        CorpusError: no label has enough tokens on both sides.
    """
    random = _choice(target)
    share = max(1, CONVERSATIONS // len(splits))
    chosen = [each for own in splits.values() for each in _some(own, share, random)]
    known = joined(categories(conversation, lm.tokenizer) for conversation in chosen)
    sample = draw(lm, sorted(set(target.sites.values())), chosen, known, target.recipe, random)
    return {"usefulness": _measured(target, sample, on_progress)}


def labelled_usefulness(
    target: Target,
    lm: LanguageModel,
    path: Path,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Sparse probing for the labels that the rows of a file state, the tokens of a row having its labels.

    Args:
        target: as `usefulness`.
        lm: likewise.
        path: file or folder of rows as in `corpus/given.py`, with `labels`: {name: value}.
        on_progress: as `usefulness`.

    Returns:
        {"tasks": ...}, a part of evaluation.json with the form of `usefulness`.

    Raises:
        CorpusError: it cannot be read, no row states a label, or no label has enough tokens on both sides.
    """
    recipe = target.recipe
    pile = RowReader(lm.tokenizer, recipe.corpus.max_length).pile(path)
    families = sorted({name for given in pile for name in given.labels})
    if not families:
        raise CorpusError(f"{path}: no row has labels; give each row labels: {{name: value}}")
    random = _choice(target)
    chosen = _some(pile, LABELLED, random)
    known = joined(stated(given, families) for given in chosen)
    conversations = [given.conversation for given in chosen]
    sample = draw(lm, sorted(set(target.sites.values())), conversations, known, recipe, random)
    return {"tasks": {"origin": path.name, **_measured(target, sample, on_progress)}}


def _measured(target: Target, sample: Sample, on_progress: OnProgress) -> dict[str, Any]:
    recipe = target.recipe
    tasks = [tasks_of(sample, derive_seed(recipe.seed, f"usefulness {number}")) for number in range(SEEDS)]
    if not all(tasks):
        raise CorpusError(
            f"no label has {FEWEST} tokens on either side in {len(set(sample.conversation_R.tolist()))} conversations, "
            "so that usefulness cannot be measured; give more data"
        )
    found = {}
    for done, (id, sae) in enumerate(target.saes.items()):
        on_progress("probing", done, len(target.saes))
        found[id] = _of_sae(sae, sample, target.sites[id], tasks, recipe.seed)
    return {
        "rows": len(sample.token_R),
        "conversations": len(np.unique(sample.conversation_R)),
        "seeds": SEEDS,
        "labels": _counts(tasks[0]),
        "tokens": _over_seeds([_probe(_TokenRates(sample), own) for own in tasks]),
        "saes": found,
    }


def _choice(target: Target) -> np.random.Generator:
    return np.random.default_rng(derive_seed(target.recipe.seed, "usefulness rows") % 2**63)


def _some(own: Sequence[T], most: int, random: np.random.Generator) -> list[T]:
    return [own[number] for number in sorted(random.choice(len(own), min(most, len(own)), replace=False).tolist())]


@torch.no_grad()
def draw(
    lm: LanguageModel,
    sites: Sequence[Site],
    chosen: Sequence[Conversation],
    known: Categories,
    recipe: Recipe,
    random: np.random.Generator,
) -> Sample:
    """Rows of at most ROWS_EACH tokens of each conversation, with what is known of them (of all tokens, in turn)."""
    found = harvest(lm, chosen, sites, recipe.activations, recipe.corpus.batch_tokens)
    conversation_R = found.conversation_R.numpy().astype(np.int64)
    kept = np.concatenate(
        [
            np.sort(random.permutation(np.flatnonzero(conversation_R == number))[:ROWS_EACH])
            for number in range(len(chosen))
        ]
    )
    ends = np.cumsum([0, *(len(conversation.token_ids) for conversation in chosen)])
    place_R = ends[conversation_R[kept]] + found.position_R.numpy()[kept]
    tokens = np.concatenate([conversation.token_ids for conversation in chosen]).astype(np.int64)
    return Sample(
        {site: x_RD[torch.from_numpy(kept).to(x_RD.device)].float() for site, x_RD in found.rows.items()},
        conversation_R[kept],
        tokens[place_R],
        {family: values[place_R] for family, values in known.items()},
    )


def tasks_of(sample: Sample, seed: int) -> list[Task]:
    """The labels with FEWEST rows on either side, learnt from and held out."""
    everyone = np.unique(sample.conversation_R)
    shuffled = np.random.default_rng(seed % 2**63).permutation(everyone)
    held_R = np.isin(sample.conversation_R, shuffled[: max(1, round(HELD_OUT * len(everyone)))])
    tasks = []
    for family, values_R in sample.categories.items():
        for _, positive_R, known_R in binary(values_R):
            task = Task(family, positive_R, known_R & ~held_R, known_R & held_R)
            sides = [positive_R[rows_R] for rows_R in (task.train_R, task.held_R)]
            if all(FEWEST <= side.sum() <= len(side) - FEWEST for side in sides):
                tasks.append(task)
    return tasks


def _of_sae(sae: SAE, sample: Sample, site: Site, tasks: Sequence[Sequence[Task]], seed: int) -> dict[str, Any]:
    x_RD = sample.rows[site]
    codes_RN = _codes(sae, x_RD)
    probes: dict[str, list[dict[str, Any]]] = {"latents": [], "frozen decoder": [], "random directions": [], "rows": []}
    for number, own in enumerate(tasks):
        drawn = derive_seed(seed, f"usefulness {number}")
        frozen = frozen_decoder_sae(x_RD, sae, drawn)
        random_RN = (x_RD - x_RD.mean(0)) @ directions(sae, drawn).to(x_RD.device).T
        for name, features_RF in (
            ("latents", codes_RN),
            ("frozen decoder", _codes(frozen, x_RD)),
            ("random directions", random_RN.cpu().numpy()),
        ):
            probes[name].append({str(k): _probe(_Few(features_RF, k), own) for k in LATENTS})
        probes["rows"].append({"all": _probe(_Few(x_RD.cpu().numpy(), None), own)})
    gaps = {
        str(k): _spread(
            [
                _mean(ours[str(k)]) - _mean(theirs[str(k)])
                for ours, theirs in zip(probes["latents"], probes["frozen decoder"], strict=True)
            ]
        )
        for k in LATENTS
    }
    density_N = (codes_RN > 0).mean(0)
    energy_N = np.square(codes_RN, dtype=np.float64).sum(0)
    mean_D, std_D = x_RD.double().mean(0), x_RD.double().std(0)
    return {
        "probing": {
            name: {k: _over_seeds([one[k] for one in found]) for k in found[0]} for name, found in probes.items()
        },
        "above_frozen_decoder": gaps,
        "dense_latents": int((density_N > DENSE).sum()),
        "dense_energy": float(energy_N[density_N > DENSE].sum() / max(energy_N.sum(), 1e-30)),
        "mean_over_std": float(mean_D.norm() / std_D.norm().clamp(min=1e-30)),
    }


@torch.no_grad()
def _codes(sae: SAE, x_RD: Tensor) -> Floats:
    values: Floats = sae.encode(x_RD).dense().float().cpu().numpy()
    return values


class _Few:
    """Scores of held-out rows by the `most` features that differ most, or by all of them."""

    def __init__(self, features_RF: Floats, most: int | None) -> None:
        self.features_RF, self.most = features_RF, most

    def __call__(self, task: Task) -> NDArray[Any]:
        train_RF, label_R = self.features_RF[task.train_R], task.positive_R[task.train_R]
        mean_F, spread_F = train_RF.mean(0, dtype=np.float64), train_RF.std(0, dtype=np.float64)
        effect_F = train_RF[label_R].mean(0, dtype=np.float64) - train_RF[~label_R].mean(0, dtype=np.float64)
        effect_F = np.where(spread_F > 1e-9, effect_F / np.maximum(spread_F, 1e-9), 0.0)
        best = np.argsort(-np.abs(effect_F), kind="stable")[: self.most]
        scaled = (self.features_RF[:, best] - mean_F[best]) / np.maximum(spread_F[best], 1e-9)
        held_RF = scaled[task.held_R]
        if self.most == 1:
            one_R: NDArray[Any] = held_RF[:, 0] * np.sign(effect_F[best[0]])
            return one_R
        probe = LogisticRegression(C=1.0, max_iter=300, class_weight="balanced")
        scores_R: NDArray[Any] = probe.fit(scaled[task.train_R], label_R).decision_function(held_RF)
        return scores_R


class _TokenRates:
    """Scores of held-out rows by how often their token had the label where it was learnt from."""

    def __init__(self, sample: Sample) -> None:
        _, self.place_R = np.unique(sample.token_R, return_inverse=True)

    def __call__(self, task: Task) -> NDArray[Any]:
        places, labels = self.place_R[task.train_R], task.positive_R[task.train_R]
        size = int(self.place_R.max()) + 1
        seen_V, had_V = np.bincount(places, minlength=size), np.bincount(places, labels, minlength=size)
        rate_V: NDArray[Any] = (had_V + labels.mean()) / (seen_V + 1)
        return rate_V[self.place_R[task.held_R]]


def _probe(score: _Few | _TokenRates, tasks: Sequence[Task]) -> dict[str, float]:
    """{family: mean AUROC over its labels}."""
    found: dict[str, list[float]] = {}
    for task in tasks:
        found.setdefault(task.family, []).append(float(roc_auc_score(task.positive_R[task.held_R], score(task))))
    return {family: float(np.mean(values)) for family, values in found.items()}


def _mean(families: Mapping[str, float]) -> float:
    return float(np.mean(list(families.values())))


def _over_seeds(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean and spread over seeds: of the mean over families, and of each."""
    families = [family for family in found[0] if all(family in one for one in found)]
    return {
        **_spread([_mean({family: one[family] for family in families}) for one in found]),
        "families": {family: _spread([one[family] for one in found]) for family in families},
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"auroc": float(np.mean(values)), "std": float(np.std(values, ddof=1))}


def _counts(tasks: Sequence[Task]) -> dict[str, int]:
    """How many labels each family has."""
    families = [task.family for task in tasks]
    return {family: families.count(family) for family in dict.fromkeys(families)}
