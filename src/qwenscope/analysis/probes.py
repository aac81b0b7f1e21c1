"""Linear probes on pooled features and the best single feature, cross-validated with whole groups apart.

Legend: C conversations, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from qwenscope.analysis.statistics import Array, Mask, auroc, auroc_interval
from qwenscope.errors import CorpusError
from qwenscope.seeds import derive_seed

FOLDS = 5
_STRENGTH = 10.0  # scikit-learn's C, of features scaled to rows of mean square 1
_SPARSE_STRENGTH = 1.0  # the same for the sparse probe, of standardised features

Floats = NDArray[Any]
Folds = list[tuple[NDArray[np.int64], NDArray[np.int64]]]


@dataclass(frozen=True)
class Linear:
    """score = features @ weight_F + bias."""

    weight_F: Array
    bias: float

    def __call__(self, features_CF: Floats) -> Array:
        """Scores, float64 [C]."""
        scores: Array = features_CF.astype(np.float64) @ self.weight_F + self.bias
        return scores


Fit = Callable[[Floats, Mask], Linear]
"""(features [C, F], labels [C]) -> a probe."""


def folds_of(positive_C: Mask, groups_C: NDArray[np.int64], seed: int) -> Folds:
    """(training, held-out) conversations of at most FOLDS folds, groups whole, labels in equal shares.

    Raises:
        CorpusError: a pile has less than two groups.
    """
    fewest = min(len(np.unique(groups_C[side_C])) for side_C in (positive_C, ~positive_C))
    if fewest < 2:
        raise CorpusError("all conversations of a pile are one group; cross-validation needs two")
    folds = StratifiedGroupKFold(min(FOLDS, fewest), shuffle=True, random_state=derive_seed(seed, "folds") % 2**32)
    return list(folds.split(np.zeros((len(positive_C), 1)), positive_C, groups_C))


def ridge(features_CF: Floats, positive_C: Mask) -> Linear:
    """Logistic regression with an L2 penalty on standardised features."""
    return _logistic(
        features_CF, positive_C, LogisticRegression(C=_STRENGTH, max_iter=500), features_CF.shape[1] ** 0.5
    )


def sparse(features_CF: Floats, positive_C: Mask) -> Linear:
    """Logistic regression with an L1 penalty: few features have a weight."""
    model = LogisticRegression(C=_SPARSE_STRENGTH, l1_ratio=1.0, solver="liblinear", max_iter=500, random_state=0)
    return _logistic(features_CF, positive_C, model, 1.0)


def best_feature(features_CF: Floats, positive_C: Mask) -> Linear:
    """The one feature with the largest effect, and its sign."""
    weight_F = np.zeros(features_CF.shape[1])
    values_CF = features_CF - features_CF.mean(0, dtype=np.float64)
    spread_F = values_CF.std(0)
    label_C = positive_C - positive_C.mean()
    effect_F = np.where(spread_F > 1e-9, label_C @ values_CF / np.maximum(spread_F, 1e-9), 0.0)
    best = int(np.abs(effect_F).argmax())
    weight_F[best] = float(np.sign(effect_F[best])) / max(float(spread_F[best]), 1e-9)
    return Linear(weight_F, 0.0)


def cross_validated(
    features_CF: Floats, positive_C: Mask, groups_C: NDArray[np.int64], folds: Folds, fit: Fit, seed: int
) -> dict[str, Any]:
    """{"auroc", "interval", "balanced_accuracy"} of held-out conversations.

    Scores are put on the scale of their fold's training scores before folds are joined. The accuracy is that of the
    threshold half way between the piles' mean training scores.
    """
    scores_C, right_C = np.zeros(len(positive_C)), np.zeros(len(positive_C), dtype=bool)
    for train, held in folds:
        labels = positive_C[train]
        probe = fit(features_CF[train], labels)
        of_train = probe(features_CF[train])
        middle = (of_train[labels].mean() + of_train[~labels].mean()) / 2
        scores_C[held] = (probe(features_CF[held]) - middle) / max(float(of_train.std()), 1e-9)
        right_C[held] = (scores_C[held] > 0) == positive_C[held]
    return {
        "auroc": auroc(scores_C, positive_C),
        "interval": auroc_interval(scores_C, positive_C, groups_C, seed),
        "balanced_accuracy": float((right_C[positive_C].mean() + right_C[~positive_C].mean()) / 2),
    }


def _logistic(features_CF: Floats, positive_C: Mask, model: LogisticRegression, scale: float) -> Linear:
    values_CF = features_CF.astype(np.float64)
    mean_F, spread_F = values_CF.mean(0), values_CF.std(0)
    alive_F = spread_F > 1e-9
    weight_F, bias = np.zeros(len(mean_F)), 0.0
    if alive_F.any():
        divided_F = spread_F[alive_F] * scale
        model.set_params(class_weight="balanced")
        model.fit((values_CF[:, alive_F] - mean_F[alive_F]) / divided_F, positive_C)
        weight_F[alive_F] = model.coef_[0] / divided_F
        bias = float(model.intercept_[0] - weight_F @ mean_F)
    return Linear(weight_F, bias)
