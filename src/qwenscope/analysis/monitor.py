"""Watch for a behavior: fit a detector with a stated false-positive rate, test it on other piles, score conversations.

    from qwenscope.analysis.monitor import fit, measure

    fit("runs/demo", "monitor", fpr=0.01, positive=..., negative=..., calibration=...)
    measure("runs/demo", "monitor", positive=..., negative=...)

Definitions: docs/analysis.md. Legend: C conversations, N latents, F latents of the detector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from qwenscope.analysis import controls
from qwenscope.analysis.contrast import POOLS, Pooled, chosen_saes, open_piles, pool_suite
from qwenscope.analysis.detector import Detector, Scores, identity
from qwenscope.analysis.heads import head
from qwenscope.analysis.piles import Piles, Reader, labelled
from qwenscope.analysis.pooling import Pool, Scope, scoped_rows
from qwenscope.analysis.probes import Fit, Linear, best_feature, cross_validated, folds_of, ridge, sparse
from qwenscope.analysis.rates import chance_interval, recall_at, share, threshold_at
from qwenscope.analysis.statistics import Array, Mask, auroc, auroc_interval
from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.given import Given, Row
from qwenscope.errors import CorpusError, FormatError
from qwenscope.evaluation.baselines import directions
from qwenscope.features.token_text import pieces_of, readable
from qwenscope.files import check_empty, write_json
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.opening import Target, as_target
from qwenscope.recipe import Recipe
from qwenscope.sae.sae import SAE
from qwenscope.training.lock import sole_writer

RATES = (0.01, 0.001)
"""At which `measure` gives recall."""
CHUNK = 256
"""Conversations that `score` reads at once."""
OnProgress = Callable[[str, int, int], None]


def silent(phase: str, done: int, total: int) -> None:
    """No progress."""


def fit(
    target: str | Path | Target,
    out: Path | str,
    *,
    fpr: float = 0.01,
    calibration: Path | None = None,
    sae: str | None = None,
    latents: Sequence[int] = (),
    pool: str = "max",
    scope: Scope = Scope(),  # noqa: B008 - frozen
    on_progress: OnProgress = silent,
    **piles: Any,
) -> dict[str, Any]:
    """Fit a monitor and write its folder.

    Args:
        target: what `open_target` takes, or what it gave.
        out: folder to write.
        fpr: false-positive rate that the threshold is for.
        calibration: conversations without the behavior; None keeps every other conversation of the negative pile from
            the fit and takes these.
        sae: which one; None takes the one whose sparse probe tells the piles apart best.
        latents: of `sae`, those to use; none named: a sparse probe chooses.
        pool: max or mean.
        scope: which tokens count; positions from the end cannot be watched.
        on_progress: called with (phase, done, total).
        piles: as `contrast.open_piles` takes them.

    Returns:
        What stands in `monitor.json`.

    Raises:
        FormatError: options that do not fit together, an SAE or latent that is not there, an `out` that is not empty.
        CorpusError: the piles cannot be read, or are too small for the rate.
        LockError: another process writes `out`.
    """
    with sole_writer(out):
        check_empty(Path(out))
        opened = as_target(target)
        ids = _check(opened, sae, latents, pool, scope, fpr)
        lm = opened.language_model(truncated=True)
        reader = Reader(lm.tokenizer, opened.recipe.corpus.max_length)
        read = open_piles(reader, **piles)
        read, held = (read, reader.pile(calibration)) if calibration else _split(read)
        threshold_at(np.zeros(len(held)), fpr, "the calibration pile")  # refuses before any work
        pooled = pool_suite(opened, lm, ids, read, scope, lambda done, total: on_progress("reading", done, total))
        id, validated = _best(opened, read, pooled, pool, latents)
        plain = _fitted(opened, lm, id, read, pooled[id], latents, pool, scope)
        scores_n = _score_all(plain, opened, lm, [given.conversation for given in held], on_progress)
        about = plain.about | {
            "fitted_on": {"positive": int(read.positive_C.sum()), "negative": int((~read.positive_C).sum())},
            "held_out": validated,
            "calibration": _profile(held) | {"rate_interval": chance_interval(len(held), fpr)},
        }
        threshold = threshold_at(scores_n, fpr, "the calibration pile")
        replace(plain, threshold=threshold, fpr=fpr, about=about).save(Path(out))
    return about | {"threshold": threshold, "fpr": fpr, "latents": plain.latents_F.tolist()}


def measure(
    target: str | Path | Target,
    monitor: Path | str,
    *,
    out: Path | None = None,
    on_progress: OnProgress = silent,
    **piles: Any,
) -> dict[str, Any]:
    """Measure a monitor on piles that it has not seen: as a whole, and on what is unlike its calibration pile.

    Args:
        target: the suite that it is for.
        monitor: its folder.
        out: file to write the result to as JSON.
        on_progress: called with (phase, done, total).
        piles: as `contrast.open_piles` takes them; of packaged pairs those that are held out.

    Returns:
        {"latents", "fpr", "slices": {name: {"conversations", "stated": {"false_positives", "recall", "holds"}, "by":
        {name: {"auroc", "interval", "at": {rate: ...}}}}}}; see docs/analysis.md.

    Raises:
        FormatError: the monitor is damaged or for another model or SAE.
        CorpusError: the piles cannot be read.
        LockError: another process writes `out`.
    """
    with sole_writer(out):
        opened = as_target(target)
        detector, lm, sae = _opened(opened, monitor)
        read = open_piles(Reader(lm.tokenizer, opened.recipe.corpus.max_length), **piles, held_out=True)
        scores = {"monitor": _score_all(detector, opened, lm, read.conversations, on_progress)}
        scores |= control_scores(detector, opened.recipe, lm, sae, read.conversations)
        groups_C, seed = read.groups_C, opened.recipe.seed
        slices = {}
        for name, in_C in _slices(read.given, detector.about["calibration"]).items():
            positive_C = read.positive_C[in_C]
            if not positive_C.all():  # which it is too where there is none
                part = {by: scores_C[in_C] for by, scores_C in scores.items()}
                groups = np.unique(groups_C[in_C], return_inverse=True)[1]
                slices[name] = _measured(detector, part, positive_C, groups, seed)
        result = head("monitor test", opened, [detector.about["sae"]])
        result |= {"latents": detector.listed(), "monitor": str(monitor), "fpr": detector.fpr, "slices": slices}
        if out is not None:
            write_json(out, result)
    return result


@dataclass(frozen=True)
class Scored:
    """One conversation and its scores."""

    detector: Detector
    tokenizer: PreTrainedTokenizerBase
    conversation: Conversation
    scores: Scores

    def line(self, *, tokens: bool = False) -> dict[str, Any]:
        """The JSON object of `monitor score`.

        Args:
            tokens: with `position`, `tokens` (their texts), `token` (scores) and `so_far` of those that count.
        """
        scores, alarm = self.scores, self.detector.alarm
        turns = [{"role": t.role, "start": t.start, "score": t.score, "alarm": alarm(t.score)} for t in scores.turns]
        said = {"id": self.conversation.id, "score": scores.score, "alarm": alarm(scores.score), "turns": turns}
        if not tokens:
            return said
        ids = self.conversation.token_ids.tolist()
        texts = readable(pieces_of(self.tokenizer, ids))
        return said | {
            "position": scores.position_T.tolist(),
            "tokens": [texts[position] for position in scores.position_T],
            "token": scores.token_T.tolist(),
            "so_far": scores.so_far_T.tolist(),
        }


def score(target: str | Path | Target, monitor: Path | str, rows: Iterable[tuple[str, Row]]) -> Iterator[Scored]:
    """Scores of every row, in order; CHUNK of them go through the model together.

    Args:
        target: the suite that the monitor is for.
        monitor: its folder.
        rows: of `piles.rows_of` or `piles.rows_of_lines`.

    Raises:
        FormatError: the monitor is damaged or for another model or SAE.
        CorpusError: a row cannot be read.
    """
    opened = as_target(target)
    detector, lm, _ = _opened(opened, monitor)
    yield from score_rows(detector, opened, lm, rows)


def score_rows(
    detector: Detector, target: Target, lm: LanguageModel, rows: Iterable[tuple[str, Row]]
) -> Iterator[Scored]:
    """As `score`, by what is loaded and known to be what the monitor is for."""
    reader, left = Reader(lm.tokenizer, target.recipe.corpus.max_length), iter(rows)
    sae = target.saes[detector.about["sae"]]
    while chunk := [reader.read(row, where).conversation for where, row in islice(left, CHUNK)]:
        for conversation, found in zip(chunk, detector.score(lm, sae, chunk, target.recipe), strict=True):
            yield Scored(detector, lm.tokenizer, conversation, found)


def control_scores(
    detector: Detector, recipe: Recipe, lm: LanguageModel, sae: SAE, conversations: list[Conversation]
) -> dict[str, Array]:
    """{control: scores [C]} of what the monitor is compared with, fitted beside it."""
    weights, scope = detector.controls, detector.scope
    site = Site(detector.about["site"])
    raw = Pool.empty(len(conversations), sae.hidden_dim, -float("inf"))
    random = Pool.empty(len(conversations), 1, -float("inf"))
    direction_D = torch.from_numpy(weights["random.direction"]).to(lm.device)
    for part in scoped_rows(lm, conversations, [site], scope, recipe):
        x_RD = part.rows[site].float()
        raw.add_dense(x_RD, part.conversation_R)
        random.add_dense(((x_RD - sae.pre_bias.detach()) @ direction_D).unsqueeze(1), part.conversation_R)
    words_CV = controls.word_counts(conversations, scope, recipe.activations.skip_roles, weights["words.ids"])
    return {
        "raw rows": Linear(weights["raw.weight"], 0.0)(controls.raw_features(raw)),
        "words": Linear(weights["words.weight"], 0.0)(words_CV),
        "random direction": random.by(detector.pool)[:, 0].double().numpy() * float(weights["random.sign"][0]),
    }


def _opened(target: Target, monitor: Path | str) -> tuple[Detector, LanguageModel, SAE]:
    """A monitor with the model and SAE that it is for."""
    detector = Detector.load(Path(monitor))
    sae = detector.sae(target)
    lm = target.language_model(truncated=True)
    detector.check_model(lm)
    return detector, lm, sae


def _check(target: Target, sae: str | None, latents: Sequence[int], pool: str, scope: Scope, fpr: float) -> list[str]:
    """The SAEs that come into question."""
    ids = chosen_saes(target, [sae] if sae else [])
    if latents and sae is None:
        raise FormatError("--latent needs --sae: a number names a latent of one SAE")
    if sae is not None and (wrong := [latent for latent in latents if not 0 <= latent < target.saes[sae].dict_size]):
        raise FormatError(f"{sae} has no latent {wrong[0]}; it has 0 to {target.saes[sae].dict_size - 1}")
    if pool not in POOLS:
        raise FormatError(f"pool {pool!r} is neither max nor mean")
    if min(scope.start or 0, scope.stop or 0) < 0:
        raise FormatError("a monitor reads tokens as they come: positions from the end cannot be watched")
    if not 0 < fpr < 1:
        raise FormatError(f"a false-positive rate of {fpr} is none; write 0.01 for 1 %")
    return ids


def _probe(latents: Sequence[int]) -> Fit:
    """A sparse probe on all latents, or one on those named."""
    if not latents:
        return sparse

    def fit_named(features_CN: NDArray[Any], positive_C: Mask) -> Linear:
        weight_N = np.zeros(features_CN.shape[1])
        named = ridge(features_CN[:, list(latents)], positive_C)
        weight_N[list(latents)] = named.weight_F
        return Linear(weight_N, named.bias)

    return fit_named


def _best(
    target: Target, piles: Piles, pooled: dict[str, Pooled], pool: str, latents: Sequence[int]
) -> tuple[str, dict[str, Any]]:
    """The SAE whose probe tells held-out conversations apart best, and how well each does."""
    seed = target.recipe.seed
    folds = folds_of(piles.positive_C, piles.groups_C, seed)
    found = {
        id: cross_validated(
            of_sae.latents.by(pool).numpy(), piles.positive_C, piles.groups_C, folds, _probe(latents), seed
        )
        for id, of_sae in pooled.items()
    }
    return max(found, key=lambda id: float(found[id]["auroc"])), found


def _fitted(
    target: Target,
    lm: LanguageModel,
    id: str,
    piles: Piles,
    pooled: Pooled,
    latents: Sequence[int],
    pool: str,
    scope: Scope,
) -> Detector:
    """A detector without a threshold, and the controls fitted beside it."""
    positive_C, sae = piles.positive_C, target.saes[id]
    probe = _probe(latents)(pooled.latents.by(pool).numpy(), positive_C)
    used_F = np.flatnonzero(probe.weight_F)
    if not len(used_F):
        raise CorpusError(f"no latent of {id} tells the piles apart; a monitor of nothing is not written")
    ids_V = controls.vocabulary(piles.conversations)
    words_CV = controls.word_counts(piles.conversations, scope, target.recipe.activations.skip_roles, ids_V)
    random = best_feature(pooled.random.by(pool).numpy(), positive_C).weight_F
    chosen = int(np.abs(random).argmax())
    weights = {
        "raw.weight": ridge(controls.raw_features(pooled.raw), positive_C).weight_F,
        "words.ids": ids_V,
        "words.weight": ridge(words_CV, positive_C).weight_F,
        "random.direction": directions(sae, target.recipe.seed)[chosen].numpy(),
        "random.sign": np.sign(random[chosen : chosen + 1]),
    }
    about = identity(target, id, lm)
    return Detector(used_F, probe.weight_F[used_F], probe.bias, pool, scope, np.inf, 1.0, about, weights)


def _score_all(
    detector: Detector, target: Target, lm: LanguageModel, conversations: list[Conversation], on_progress: OnProgress
) -> Array:
    """Scores [C] of whole conversations."""
    scores_C = np.zeros(len(conversations))
    sae = target.saes[detector.about["sae"]]
    for c, found in enumerate(detector.score(lm, sae, conversations, target.recipe)):
        scores_C[c] = found.score
        on_progress("scoring", c + 1, len(conversations))
    return scores_C


def _split(piles: Piles) -> tuple[Piles, list[Given]]:
    """Every other group with a negative conversation goes to calibration, and out of the fit."""
    groups_C = piles.groups_C
    held_C = np.isin(groups_C, np.unique(groups_C[~piles.positive_C])[1::2])
    given = np.array(piles.given, dtype=object)
    fitted = labelled(list(given[~held_C]), piles.positive_C[~held_C].tolist())
    return fitted, list(given[held_C & ~piles.positive_C])


def _profile(given: Sequence[Given]) -> dict[str, Any]:
    """What calibration conversations are like."""
    lengths = [len(each.conversation.token_ids) for each in given]
    return {
        "conversations": len(given),
        "sources": sorted({each.conversation.source for each in given}),
        "languages": sorted({each.language for each in given}),
        "tokens": [float(edge) for edge in np.quantile(lengths, [0.025, 0.975])],
    }


def _slices(given: Sequence[Given], calibration: dict[str, Any]) -> dict[str, Mask]:
    """{name: bool [C]}: all, those like the calibration pile, and each way in which others are unlike it."""
    source_C = np.array([each.conversation.source for each in given])
    language_C = np.array([each.language for each in given])
    tokens_C = np.array([len(each.conversation.token_ids) for each in given])
    low, high = calibration["tokens"]
    shifted = {f"source {name}": source_C == name for name in sorted(set(source_C) - set(calibration["sources"]))}
    shifted |= {
        f"language {name}": language_C == name for name in sorted(set(language_C) - set(calibration["languages"]))
    }
    shifted |= {"longer": tokens_C > high, "shorter": tokens_C < low}
    unlike_C = np.any(list(shifted.values()), axis=0)
    return {"all": np.ones(len(given), dtype=bool), "like the calibration pile": ~unlike_C, **shifted}


def _measured(
    detector: Detector, scores: dict[str, Array], positive_C: Mask, groups_C: NDArray[np.int64], seed: int
) -> dict[str, Any]:
    """One slice of a test: without conversations with the behavior, only how often the others raise an alarm."""
    above_C = scores["monitor"] > detector.threshold
    false = share(above_C[~positive_C])
    compared = scores if positive_C.any() else {}
    return {
        "conversations": {"positive": int(positive_C.sum()), "negative": int((~positive_C).sum())},
        "stated": {
            "false_positives": false,
            "recall": share(above_C[positive_C]) if positive_C.any() else None,
            "holds": false["interval"][0] <= detector.fpr,
        },
        "by": {
            name: {
                "auroc": auroc(scores_C, positive_C),
                "interval": auroc_interval(scores_C, positive_C, groups_C, seed),
                "at": {str(rate): recall_at(scores_C[positive_C], scores_C[~positive_C], rate, seed) for rate in RATES},
            }
            for name, scores_C in compared.items()
        },
    }
