"""Sparse probing (Gurnee et al. 2023, arXiv 2305.01610): how well a few features tell a token's labels apart, with
intervals over conversations. docs/evaluation.md defines each number.

Legend: R rows (tokens), H held-out rows, D hidden, N latents, F any features, C conversations, S one draw that holds
every conversation once and then those of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from qwenscope.evaluation.pairs import interval, resample
from qwenscope.evaluation.token_labels import Categories, binary
from qwenscope.lm.sites import Site

FEWEST = 20
"""Rows that a label and its absence have, among those learnt from and among those held out."""
HELD_OUT = 0.3

Array = NDArray[np.float64]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Draws = dict[str, Array]
"""{family: a figure under each draw of conversations, [S]}; NaN where a draw leaves nothing to measure."""


@dataclass(frozen=True)
class Sample:
    """Rows with what is known of their tokens, conversation by conversation."""

    rows: Mapping[Site, Tensor]
    """[R, D]."""
    conversation_R: NDArray[np.int64]
    """Ascending, from 0."""
    token_R: NDArray[np.int64]
    categories: Categories
    """What probes look for, [R] each."""
    letters: Categories
    """The first letter of each token, [R]: what absorption is looked for in."""


@dataclass(frozen=True)
class Task:
    """One label: which rows have it, and which are learnt from and held out, none of the same conversation."""

    family: str
    positive_R: Mask
    train_R: Mask
    held_R: Mask


@dataclass(frozen=True)
class Probe:
    """Features in order of how far their mean differs between the sides of a task, in standard deviations."""

    features_RF: Floats
    task: Task
    mean_F: Array
    spread_F: Array
    effect_F: Array
    order_F: NDArray[np.int64]

    @classmethod
    def of(cls, features_RF: Floats, task: Task) -> Probe:
        """What the rows that are learnt from say of each feature."""
        train_RF, label_R = features_RF[task.train_R], task.positive_R[task.train_R]
        mean_F, spread_F = train_RF.mean(0, dtype=np.float64), train_RF.std(0, dtype=np.float64)
        effect_F = train_RF[label_R].mean(0, dtype=np.float64) - train_RF[~label_R].mean(0, dtype=np.float64)
        effect_F = np.where(spread_F > 1e-9, effect_F / np.maximum(spread_F, 1e-9), 0.0)
        return cls(features_RF, task, mean_F, spread_F, effect_F, np.argsort(-np.abs(effect_F), kind="stable"))

    def scaled(self, features: NDArray[np.int64]) -> Array:
        """These features in standard deviations from their means, [R, features]."""
        found: Array = (self.features_RF[:, features] - self.mean_F[features]) / np.maximum(
            self.spread_F[features], 1e-9
        )
        return found

    def regression(self, features: NDArray[np.int64]) -> LogisticRegression:
        """Logistic regression on these features, `scaled`."""
        learner = LogisticRegression(C=1.0, max_iter=300, class_weight="balanced")
        return learner.fit(self.scaled(features)[self.task.train_R], self.task.positive_R[self.task.train_R])

    def scores(self, most: int) -> Array:
        """Of held-out rows, by the `most` features that differ most: [H]."""
        best = self.order_F[:most]
        if most == 1:
            one_H: Array = self.scaled(best)[self.task.held_R, 0] * np.sign(self.effect_F[best[0]])
            return one_H
        scores_H: Array = self.regression(best).decision_function(self.scaled(best)[self.task.held_R])
        return scores_H


def token_rates(sample: Sample, task: Task) -> Array:
    """Scores of held-out rows by how often their token had the label where it was learnt from: [H]."""
    _, place_R = np.unique(sample.token_R, return_inverse=True)
    places, labels = place_R[task.train_R], task.positive_R[task.train_R]
    size = int(place_R.max()) + 1
    seen_V, had_V = np.bincount(places, minlength=size), np.bincount(places, labels, minlength=size)
    rate_V: Array = (had_V + labels.mean()) / (seen_V + 1)
    return rate_V[place_R[task.held_R]]


def tasks_of(sample: Sample, known: Categories, seed: int) -> list[Task]:
    """The labels with FEWEST rows on either side, learnt from and held out."""
    everyone = np.unique(sample.conversation_R)
    shuffled = np.random.default_rng(seed % 2**63).permutation(everyone)
    held_R = np.isin(sample.conversation_R, shuffled[: max(1, round(HELD_OUT * len(everyone)))])
    tasks = []
    for family, values_R in known.items():
        for _, positive_R, known_R in binary(values_R):
            task = Task(family, positive_R, known_R & ~held_R, known_R & held_R)
            sides = [positive_R[rows_R] for rows_R in (task.train_R, task.held_R)]
            if all(FEWEST <= side.sum() <= len(side) - FEWEST for side in sides):
                tasks.append(task)
    return tasks


def draws(sample: Sample, seed: int) -> Array:
    """How often each conversation is drawn, [S, C]: all once, then those of the bootstrap."""
    conversations = int(sample.conversation_R.max()) + 1
    return np.concatenate([np.ones((1, conversations)), resample(conversations, seed)])


def auroc(score_H: Array, positive_H: Mask, conversation_H: NDArray[np.int64], weight_SC: Array) -> Array:
    """AUROC under each draw of conversations, [S]: the share of pairs of a row with the label and one without that are
    in the right order, ties as half; a row counts as often as its conversation was drawn. NaN without a pair."""
    over, under = score_H[positive_H], score_H[~positive_H]
    right_PQ = (over[:, None] > under).astype(np.float64)
    right_PQ += 0.5 * (over[:, None] == under)
    first_P, with_P, ours_P = _blocks(conversation_H[positive_H])
    first_Q, without_Q, ours_Q = _blocks(conversation_H[~positive_H])
    right_CC = np.add.reduceat(np.add.reduceat(right_PQ, first_P, axis=0), first_Q, axis=1)
    one_SC, other_SC = weight_SC[:, ours_P], weight_SC[:, ours_Q]
    with np.errstate(invalid="ignore"):
        found_S: Array = ((one_SC @ right_CC) * other_SC).sum(1) / ((one_SC @ with_P) * (other_SC @ without_Q))
    return found_S


def _blocks(conversation: NDArray[np.int64]) -> tuple[NDArray[np.int64], Array, NDArray[np.int64]]:
    """Where each conversation of ascending rows begins, how many rows it has, and which it is."""
    ours, first, rows = np.unique(conversation, return_index=True, return_counts=True)
    return first, rows.astype(np.float64), ours


def by_family(found: Iterable[tuple[str, Array]]) -> Draws:
    """{family: mean over its labels under each draw}; a label that a draw has not is left out of it."""
    grouped: dict[str, list[Array]] = {}
    for family, value_S in found:
        grouped.setdefault(family, []).append(value_S)
    return {family: _nanmean(values) for family, values in grouped.items()}


def over_families(found: Mapping[str, Array]) -> Array:
    """The mean of families under each draw, [S]."""
    return _nanmean(list(found.values()))


def over_seeds(found: Sequence[Draws], name: str) -> dict[str, Any]:
    """{name: mean over seeds, std: over seeds, interval: over conversations} of the mean over families, and of each."""
    families = [family for family in found[0] if all(family in one for one in found)]
    if not families:
        return {name: None, "std": None, "interval": None, "families": {}}
    return {
        **spread([over_families({family: one[family] for family in families}) for one in found], name),
        "families": {family: spread([one[family] for one in found], name) for family in families},
    }


def spread(values: Sequence[Array], name: str) -> dict[str, Any]:
    """Of one figure: its mean and standard deviation over seeds, and the interval of the mean over conversations."""
    measured = [value_S[0] for value_S in values]
    drawn_S = _nanmean(values)[1:]
    return {
        name: float(np.mean(measured)),
        "std": float(np.std(measured, ddof=1)),
        "interval": interval(drawn_S[np.isfinite(drawn_S)]),
    }


def _nanmean(values: Sequence[Array]) -> Array:
    """Mean under each draw of what it has; NaN where it has nothing."""
    stacked = np.stack(values)
    there = np.isfinite(stacked)
    with np.errstate(invalid="ignore"):
        mean_S: Array = np.where(there, stacked, 0.0).sum(0) / there.sum(0)
    return mean_S
