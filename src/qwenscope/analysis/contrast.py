"""Contrast two piles of conversations: which latents go with a behavior, and does the SAE add anything?

    from qwenscope.analysis.contrast import contrast, open_piles

    result = contrast("runs/demo", example="asks-before-acting", out="contrast")

Every latent is pooled per conversation and tested; beside the best latent and a sparse probe on all latents stand a
probe on the rows themselves, one on words, random directions, an SAE with a frozen random decoder, and one on length
and roles alone, all on the same folds. Definitions: docs/analysis.md.

Legend: C conversations, N latents, F latents that are tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenscope.analysis import controls
from qwenscope.analysis.heads import head
from qwenscope.analysis.piles import Piles, Reader, example_path
from qwenscope.analysis.pooling import Pool, Scope, scoped_rows
from qwenscope.analysis.probes import Fit, best_feature, cross_validated, folds_of, ridge, sparse
from qwenscope.analysis.statistics import (
    Design,
    auroc,
    cohens_d,
    effect_intervals,
    effects,
    permutation_test,
)
from qwenscope.errors import FormatError
from qwenscope.evaluation.baselines import directions, frozen_decoder_sae
from qwenscope.features.pushes import write_pushes
from qwenscope.files import check_empty, whole_folder, write_json
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target, as_target
from qwenscope.sae.formats.directions import Push
from qwenscope.sae.sae import SAE
from qwenscope.training.lock import sole_writer

FEWEST_ACTIVE = 3
"""Conversations in which a latent must be active to be tested: a rule that does not look at the labels."""
LISTED = 50
FDR = 0.05
STEERED = 0.3
"""Strength in the steering file, in norms of the row."""
POOLS = ("max", "mean")
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Pooled:
    """One SAE's latents and its controls over all conversations."""

    latents: Pool
    raw: Pool
    random: Pool
    frozen: Pool


def open_piles(
    reader: Reader,
    *,
    positive: Path | None = None,
    negative: Path | None = None,
    data: Path | None = None,
    label: str | None = None,
    pairs: Path | None = None,
    example: str | None = None,
    held_out: bool = False,
) -> Piles:
    """Two places, one with labels (`label` is KEY=VALUE, or a KEY that is true), pairs, or packaged pairs: of these
    those that are held out, or the others.

    Raises:
        FormatError: none or several of these.
        CorpusError: as `Reader`'s methods, or no such example.
    """
    ways = [positive is not None or negative is not None, data is not None or label is not None, pairs, example]
    whole = (positive is None) == (negative is None) and (data is None) == (label is None)
    if sum(map(bool, ways)) != 1 or not whole:
        raise FormatError("name --positive and --negative, or --data and --label, or --pairs, or --example")
    if positive is not None and negative is not None:
        return reader.two_piles(positive, negative)
    if data is not None and label is not None:
        key, _, value = label.partition("=")
        return reader.labelled(data, key, value or "true")
    return reader.pairs(example_path(example), held_out=held_out) if example else reader.pairs(pairs or Path())


def contrast(
    target: str | Path | Target,
    *,
    out: Path | str | None = None,
    saes: Sequence[str] = (),
    pool: str = "max",
    scope: Scope = Scope(),  # noqa: B008 - frozen
    on_progress: OnProgress = lambda phase, done, total: None,
    **piles: Any,
) -> dict[str, Any]:
    """Test every latent of a suite between two piles.

    Args:
        target: what `open_target` takes, or what it gave.
        out: folder for contrast.json and steering.json; None writes nothing.
        saes: ids of those looked at; none named: all.
        pool: max or mean over the tokens that count.
        scope: which tokens count.
        on_progress: called with (phase, done, total).
        piles: as `open_piles` takes them.

    Returns:
        docs/analysis.md says what the keys mean.

    Raises:
        FormatError: an SAE that is not there, an unknown pool, an `out` that is not empty.
        CorpusError: the piles cannot be read or are too small.
        LockError: another process writes `out`.
    """
    with sole_writer(out):
        if out is not None:
            check_empty(Path(out))
        opened = as_target(target)
        ids = chosen_saes(opened, saes)
        if pool not in POOLS:
            raise FormatError(f"pool {pool!r} is neither max nor mean")
        lm = opened.language_model(truncated=True)
        reader = Reader(lm.tokenizer, opened.recipe.corpus.max_length)
        read = open_piles(reader, **piles)
        pooled = pool_suite(opened, lm, ids, read, scope, lambda done, total: on_progress("reading", done, total))
        result = compare_piles(opened, read, pooled, pool, scope, on_progress)
        if out is not None:
            with whole_folder(Path(out)) as folder:
                write_json(folder / "contrast.json", result)
                if pushes := steered(result):
                    write_pushes(folder / "steering.json", pushes)
    return result


def chosen_saes(target: Target, saes: Sequence[str]) -> list[str]:
    """The ids named, or all.

    Raises:
        FormatError: one is not there.
    """
    if unknown := [id for id in saes if id not in target.saes]:
        raise FormatError(f"--sae {unknown[0]} is not in {target.name}; it holds {', '.join(target.saes)}")
    return list(saes) or list(target.saes)


def pool_suite(
    target: Target,
    lm: LanguageModel,
    ids: Sequence[str],
    piles: Piles,
    scope: Scope,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Pooled]:
    """One pass of the language model over both piles; frozen-decoder SAEs are trained on the rows of its first chunk,
    for which the conversations come in an order of their own that mixes the piles.
    """
    conversations, seed = piles.conversations, target.recipe.seed
    order = np.random.default_rng(seed).permutation(len(conversations))
    sites = sorted({target.sites[id] for id in ids})
    count = len(conversations)
    pooled, frozen, random = {}, dict[str, SAE](), dict[str, Tensor]()
    for id in ids:
        sae = target.saes[id]
        pools = [Pool.empty(count, width, low) for width, low in _widths(sae)]
        pooled[id] = Pooled(*pools)
        random[id] = directions(sae, seed).to(lm.device)
    shuffled = [conversations[c] for c in order]
    for part in scoped_rows(lm, shuffled, sites, scope, target.recipe, on_progress):
        conversation_R = torch.from_numpy(order)[part.conversation_R]
        for id in ids if len(conversation_R) else ():
            x_RD, sae = part.rows[target.sites[id]].float(), target.saes[id]
            if id not in frozen:
                frozen[id] = frozen_decoder_sae(x_RD, sae, seed)
            with torch.no_grad():
                pooled[id].latents.add_codes(sae.encode(x_RD), conversation_R)
                pooled[id].frozen.add_codes(frozen[id].encode(x_RD), conversation_R)
                centred_RD = x_RD - sae.pre_bias
                for rows in torch.split(torch.arange(len(x_RD)), 4096):
                    pooled[id].random.add_dense(centred_RD[rows] @ random[id].T, conversation_R[rows])
            pooled[id].raw.add_dense(x_RD, conversation_R)
    return pooled


def _widths(sae: SAE) -> list[tuple[int, float]]:
    """Width and lowest value of each pool of `Pooled`."""
    low = -float("inf")
    return [(sae.dict_size, 0.0), (sae.hidden_dim, low), (sae.dict_size, low), (sae.dict_size, 0.0)]


def compare_piles(
    target: Target,
    piles: Piles,
    pooled: dict[str, Pooled],
    pool: str,
    scope: Scope,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """The result, from pooled features."""
    seed, design = target.recipe.seed, Design(piles.positive_C, piles.paired)
    names, features_CF = tested_latents(pooled, pool)
    on_progress("testing", 0, 1)
    tested = permutation_test(features_CF, design, seed, FDR)
    listed_F = effects(features_CF, design).abs().argsort(descending=True, stable=True)[:LISTED]
    confound_CF = controls.confound_features(piles.conversations)[1]
    listed = listed_features(features_CF[:, listed_F], design, confound_CF, seed)
    p_values = {"p": tested.p_F, "q": tested.q_F, "p_family": tested.family_F}
    latents = [
        {"sae": names[f][0], "latent": names[f][1], **{name: float(of_F[f]) for name, of_F in p_values.items()}, **cell}
        for f, cell in zip(listed_F.tolist(), listed, strict=True)
    ]
    on_progress("testing", 1, 1)
    return {
        **head("contrast", target, pooled),
        "model": target.recipe.lm.model,
        "conversations": {"positive": int(design.positive_C.sum()), "negative": int((~design.positive_C).sum())},
        "paired": piles.paired,
        "pool": pool,
        "scope": {"roles": list(scope.roles), "start": scope.start, "stop": scope.stop},
        "tested": len(names),
        "found": int((tested.q_F <= FDR).sum()),
        "fdr": FDR,
        "permutations": tested.permutations,
        "latents": latents,
        "controls": compare_controls(target, piles, pooled, pool, scope, on_progress),
        "confounds": controls.confounds(piles, design, seed),
    }


def listed_features(
    features_CF: Tensor, design: Design, confound_CF: NDArray[np.float32], seed: int
) -> list[dict[str, Any]]:
    """What is said of each of a few features [C, F] besides its p-values."""
    effect_F = effects(features_CF, design).tolist()
    adjusted_F = controls.adjusted_effects(features_CF, design, confound_CF).tolist()
    cells = []
    for f, interval in enumerate(effect_intervals(features_CF, design, seed)):
        values_C = features_CF[:, f].numpy().astype(np.float64)
        sides = {"positive": values_C[design.positive_C], "negative": values_C[~design.positive_C]}
        cells.append(
            {
                "effect": effect_F[f],
                "interval": interval,
                "d": cohens_d(effect_F[f], design),
                "auroc": auroc(values_C, design.positive_C),
                "adjusted_effect": adjusted_F[f],
                "mean": {side: float(values.mean()) for side, values in sides.items()},
                "active": {side: float((values > 0).mean()) for side, values in sides.items()},
            }
        )
    return cells


def tested_latents(pooled: dict[str, Pooled], pool: str) -> tuple[list[tuple[str, int]], Tensor]:
    """(sae_id, latent) of those active in enough conversations, and their features, float32 [C, F]."""
    names, columns = [], []
    for id, of_sae in pooled.items():
        alive = ((of_sae.latents.active_CF > 0).sum(0) >= FEWEST_ACTIVE).nonzero().squeeze(1)
        names += [(id, latent) for latent in alive.tolist()]
        columns.append(of_sae.latents.by(pool)[:, alive])
    return names, torch.cat(columns, dim=1)


def compare_controls(
    target: Target,
    piles: Piles,
    pooled: dict[str, Pooled],
    pool: str,
    scope: Scope,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """{sae_id: {name: of `cross_validated`}}, and under "" what looks at no SAE: words, length and roles."""
    seed, skip_roles = target.recipe.seed, target.recipe.activations.skip_roles
    folds = folds_of(piles.positive_C, piles.groups_C, seed)
    conversations = piles.conversations

    def measured(features_CF: Any, fit: Fit) -> dict[str, Any]:
        return cross_validated(features_CF, piles.positive_C, piles.groups_C, folds, fit, seed)

    words_CV = controls.word_counts(conversations, scope, skip_roles, controls.vocabulary(conversations))
    found: dict[str, Any] = {
        "": {
            "words": measured(words_CV, ridge),
            "length and roles": measured(controls.confound_features(conversations)[1], ridge),
        }
    }
    for done, (id, of_sae) in enumerate(pooled.items()):
        on_progress("controls", done, len(pooled))
        latents_CN = of_sae.latents.by(pool).numpy()
        found[id] = {
            "best latent": measured(latents_CN, best_feature),
            "sparse probe on latents": measured(latents_CN, sparse),
            "probe on raw rows": measured(controls.raw_features(of_sae.raw), ridge),
            "best random direction": measured(of_sae.random.by(pool).numpy(), best_feature),
            "best latent, frozen decoder": measured(of_sae.frozen.by(pool).numpy(), best_feature),
        }
    on_progress("controls", len(pooled), len(pooled))
    return found


def steered(result: dict[str, Any]) -> list[Push]:
    """The latent with the largest positive effect, if one was found, as something to steer along."""
    found = [each for each in result["latents"] if each["q"] <= result["fdr"] and each["effect"] > 0]
    return [Push(each["sae"], each["latent"], STEERED) for each in found[:1]]
