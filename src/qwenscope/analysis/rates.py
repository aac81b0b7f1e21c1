"""False-positive rates that are stated: thresholds from calibration scores, and recall at a rate, with intervals.

A threshold at rate a from n scores of conversations without the behavior is their k-th largest, k = floor(a (n + 1)): a
further such conversation is above it with chance k / (n + 1), whatever the scores' distribution (split conformal
prediction; Vovk et al. 2005). Over calibration piles that chance follows Beta(k, n + 1 - k).

Legend: n scores, S bootstrap samples, P positive and Q negative conversations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from qwenscope.analysis.statistics import Array
from qwenscope.errors import CorpusError
from qwenscope.evaluation.pairs import LEVEL, interval, resample
from qwenscope.seeds import derive_seed

FEWEST_ABOVE = 5
"""Expected scores above a threshold: with fewer of them a rate is not stated."""


def needed(fpr: float) -> int:
    """Conversations without the behavior that a stated rate takes: 500 for 1 %."""
    return int(np.ceil(FEWEST_ABOVE / fpr - 1e-9))


def threshold_at(scores_n: Array, fpr: float, what: str) -> float:
    """The score that further conversations exceed at rate `fpr` at most.

    Raises:
        CorpusError: there are too few scores to say; names `what` they are of.
    """
    if len(scores_n) < needed(fpr):
        raise CorpusError(
            f"{what} has {len(scores_n):,} conversations; a false-positive rate of {fpr:.3%} cannot be stated with "
            f"fewer than {needed(fpr):,}: give more, or state a higher rate"
        )
    return float(np.sort(scores_n)[-_rank(len(scores_n), fpr)])


def chance_interval(count: int, fpr: float) -> list[float]:
    """Between which rates a threshold of `threshold_at` lies at LEVEL, as the calibration pile happens to be."""
    k = _rank(count, fpr)
    return [float(beta.ppf(side, k, count + 1 - k)) for side in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]


def share(above: NDArray[np.bool_]) -> dict[str, Any]:
    """{"rate", "interval" (Clopper and Pearson 1934), "count"} of conversations above a threshold."""
    hits, count = int(above.sum()), len(above)
    low = float(beta.ppf((1 - LEVEL) / 2, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf((1 + LEVEL) / 2, hits + 1, count - hits)) if hits < count else 1.0
    return {"rate": hits / count, "interval": [low, high], "count": count}


def recall_at(positive_P: Array, negative_Q: Array, fpr: float, seed: int) -> dict[str, Any]:
    """Recall where the negative pile itself is exceeded at rate `fpr`: {"recall", "interval"}, or {"refused": why}.

    The interval is a percentile bootstrap over the conversations of both piles, with the threshold found anew.
    """
    try:
        at = threshold_at(negative_Q, fpr, "the negative pile")
    except CorpusError as error:
        return {"refused": str(error)}
    falling_Q = np.sort(negative_Q)[::-1]
    drawn_SQ = np.cumsum(resample(len(falling_Q), derive_seed(seed, "negative")), axis=1)
    at_S = falling_Q[(drawn_SQ >= _rank(len(falling_Q), fpr)).argmax(1)]
    weights_SP = resample(len(positive_P), derive_seed(seed, "positive"))
    samples_S = (weights_SP * (positive_P[None] > at_S[:, None])).sum(1) / len(positive_P)
    return {"recall": float((positive_P > at).mean()), "interval": interval(samples_S)}


def _rank(count: int, fpr: float) -> int:
    """k of the docstring, at least 1."""
    return max(1, int(np.floor(fpr * (count + 1) + 1e-9)))
