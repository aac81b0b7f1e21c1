"""Whether latents are of use, which a low error does not say: how well a few of them tell labels apart (probing.py),
beside rows as they are, an SAE whose decoder was never trained, random directions and the tokens themselves; how often
a label's latents are silent because another one took its direction in (absorption.py). docs/evaluation.md defines each
number.

    from qwenscope.evaluation.usefulness import usefulness

Legend: as in probing.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from qwenscope.activations.harvest import harvest
from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.given import RowReader
from qwenscope.errors import CorpusError
from qwenscope.evaluation.absorption import absorption, label_directions
from qwenscope.evaluation.baselines import directions, frozen_decoder_sae
from qwenscope.evaluation.probing import (
    FEWEST,
    Array,
    Draws,
    Floats,
    Probe,
    Sample,
    Task,
    auroc,
    by_family,
    draws,
    over_families,
    over_seeds,
    spread,
    tasks_of,
    token_rates,
)
from qwenscope.evaluation.token_labels import Categories, categories, joined, letters, stated
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
DENSE = 0.1
"""A latent that fires on more tokens is dense."""

T = TypeVar("T")
Found = dict[str, dict[str, Draws]]
"""{what was probed: {number of latents, or which share: figures}}."""


@dataclass(frozen=True)
class Division:
    """What one seed divides the conversations into, for the sample's labels and for first letters."""

    seed: int
    tasks: list[Task]
    letters: list[Task]


def usefulness(
    target: Target,
    lm: LanguageModel,
    splits: Mapping[str, Sequence[Conversation]],
    on_progress: OnProgress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Sparse probing and absorption of every SAE, its dense latents, and how far from centred its rows are.

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
    seeds = [derive_seed(target.recipe.seed, f"usefulness {number}") for number in range(SEEDS)]
    divisions = [
        Division(seed, tasks_of(sample, sample.categories, seed), tasks_of(sample, sample.letters, seed))
        for seed in seeds
    ]
    if not all(division.tasks for division in divisions):
        raise CorpusError(
            f"no label has {FEWEST} tokens on either side in {len(set(sample.conversation_R.tolist()))} conversations, "
            "so that usefulness cannot be measured; give more data"
        )
    weight_SC = draws(sample, target.recipe.seed)
    found = {}
    for done, (id, sae) in enumerate(target.saes.items()):
        on_progress("probing", done, len(target.saes))
        found[id] = of_sae(sae, sample, target.sites[id], divisions, weight_SC)
    rates = [
        by_family((task.family, _auroc(token_rates(sample, task), sample, task, weight_SC)) for task in division.tasks)
        for division in divisions
    ]
    return {
        "rows": len(sample.token_R),
        "conversations": len(np.unique(sample.conversation_R)),
        "seeds": SEEDS,
        "labels": _counts(divisions[0].tasks),
        "tokens": over_seeds(rates, "auroc"),
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
    first = joined(letters(conversation, lm.tokenizer) for conversation in chosen)
    tokens = np.concatenate([conversation.token_ids for conversation in chosen]).astype(np.int64)
    return Sample(
        {site: x_RD[torch.from_numpy(kept).to(x_RD.device)].float() for site, x_RD in found.rows.items()},
        conversation_R[kept],
        tokens[place_R],
        {family: values[place_R] for family, values in known.items()},
        {family: values[place_R] for family, values in first.items()},
    )


def of_sae(sae: SAE, sample: Sample, site: Site, divisions: Sequence[Division], weight_SC: Array) -> dict[str, Any]:
    """The figures of one SAE on the rows of its site; `weight_SC` of `probing.draws`."""
    x_RD = sample.rows[site]
    codes_RN = _codes(sae, x_RD)
    seeds = [_of_division(sae, codes_RN, x_RD, sample, division, weight_SC) for division in divisions]
    probed, absorbed = ([one[part] for one in seeds] for part in ("probing", "absorption"))
    density_N = (codes_RN > 0).mean(0)
    energy_N = np.square(codes_RN, dtype=np.float64).sum(0)
    mean_D, std_D = x_RD.double().mean(0), x_RD.double().std(0)
    return {
        "probing": _over_seeds(probed, "auroc"),
        "above_frozen_decoder": {
            str(k): spread(
                [
                    over_families(one["latents"][str(k)]) - over_families(one["frozen decoder"][str(k)])
                    for one in probed
                ],
                "auroc",
            )
            for k in LATENTS
        },
        "absorption": _over_seeds(absorbed, "share"),
        "dense_latents": int((density_N > DENSE).sum()),
        "dense_energy": float(energy_N[density_N > DENSE].sum() / max(energy_N.sum(), 1e-30)),
        "mean_over_std": float(mean_D.norm() / std_D.norm().clamp(min=1e-30)),
    }


def _of_division(
    sae: SAE, codes_RN: Floats, x_RD: Tensor, sample: Sample, division: Division, weight_SC: Array
) -> dict[str, Found]:
    """Probing and absorption under one seed, beside its controls; no absorption of a transcoder, which writes elsewhere
    than it reads."""
    frozen = frozen_decoder_sae(x_RD, sae, division.seed)
    frozen_RN = _codes(frozen, x_RD)
    random_RN = ((x_RD - x_RD.mean(0)) @ directions(sae, division.seed).to(x_RD.device).T).cpu().numpy()
    probed: Found = {
        name: _probed(features_RF, sample, division.tasks, weight_SC)
        for name, features_RF in (
            ("latents", codes_RN),
            ("frozen decoder", frozen_RN),
            ("random directions", random_RN),
        )
    }
    reads = sae.target_dim == sae.hidden_dim and "target" not in sae.config
    labels = label_directions(x_RD, [*division.tasks, *(division.letters if reads else ())])
    probed["rows"] = {
        "all": by_family(
            (label.task.family, _auroc(label.score_R[label.task.held_R], sample, label.task, weight_SC))
            for label in labels[: len(division.tasks)]
        )
    }
    absorbed: Found = {}
    for name, one, one_RN in (("latents", sae, codes_RN), ("frozen decoder", frozen, frozen_RN)) if reads else ():
        counts = absorption(one, one_RN, x_RD, labels, sample.conversation_R, division.seed)
        absorbed[name] = {what: counted.shares(weight_SC) for what, counted in counts.items()}
    return {"probing": probed, "absorption": absorbed}


@torch.no_grad()
def _codes(sae: SAE, x_RD: Tensor) -> Floats:
    values: Floats = sae.encode(x_RD).dense().float().cpu().numpy()
    return values


def _probed(features_RF: Floats, sample: Sample, tasks: Sequence[Task], weight_SC: Array) -> dict[str, Draws]:
    """{number of features: AUROC by family under each draw}."""
    probes = [Probe.of(features_RF, task) for task in tasks]
    return {
        str(k): by_family(
            (probe.task.family, _auroc(probe.scores(k), sample, probe.task, weight_SC)) for probe in probes
        )
        for k in LATENTS
    }


def _over_seeds(found: Sequence[Found], figure: str) -> dict[str, Any]:
    return {
        name: {key: over_seeds([one[name][key] for one in found], figure) for key in of}
        for name, of in found[0].items()
    }


def _auroc(score_H: Array, sample: Sample, task: Task, weight_SC: Array) -> Array:
    return auroc(score_H, task.positive_R[task.held_R], sample.conversation_R[task.held_R], weight_SC)


def _counts(tasks: Sequence[Task]) -> dict[str, int]:
    """How many labels each family has."""
    families = [task.family for task in tasks]
    return {family: families.count(family) for family in dict.fromkeys(families)}
