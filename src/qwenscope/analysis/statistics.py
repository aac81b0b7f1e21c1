"""Effects, permutation tests and intervals for many features at once: everything is one matrix product over draws.

The effect of a feature is a correlation in [-1, 1]. Between two piles it is that of the feature with the label (the
point-biserial correlation r); for pairs, u = mean(difference) / root mean square(difference). Cohen's d follows from
either: d = r / sqrt((1 - r^2) p q) with the piles' shares p and q, and d_z = u / sqrt(1 - u^2) for pairs.

Both are linear in the labels once a feature is centred and scaled, so that a product of permuted labels [B, X] with
the features [X, F] tests all of them under the same permutations.

Legend: C conversations, X units that are permuted (conversations, or pairs), F features, B permutations, S bootstrap
samples, P positive and Q negative conversations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, rankdata
from torch import Tensor

from qwenscope.evaluation.pairs import interval, resample
from qwenscope.seeds import derive_seed

FIRST, MOST = 1_000, 1_000_000
"""Permutations of every feature, and of one whose p-value is still open at the end."""
BATCH = 10_000
ENOUGH = 30
"""Permutations that reach the effect, after which a feature's p-value is settled."""
_TIE = 1e-5  # effects closer than this are the same: float32 sums of discrete features

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Design:
    """What is permuted: the labels of conversations, or the sides of pairs."""

    positive_C: Mask
    paired: bool

    @property
    def share(self) -> float:
        """Of positive conversations."""
        return float(self.positive_C.mean())

    def units(self, features_CF: Tensor) -> Tensor:
        """float32 [X, F], scaled so that `weights() @ units` is the effect; features without variation are 0."""
        values_XF = features_CF.double()
        values_XF = values_XF[0::2] - values_XF[1::2] if self.paired else values_XF - values_XF.mean(0)
        scale_F = values_XF.square().mean(0).sqrt()
        units_XF = torch.where(scale_F > 1e-9, values_XF / scale_F.clamp(min=1e-9), 0.0)
        return units_XF.float()

    def weights(self) -> Tensor:
        """float32 [X] of the labels as they are."""
        if self.paired:
            count = len(self.positive_C) // 2
            return torch.full((count,), 1 / count, dtype=torch.float32)
        return self._label_weights(self.positive_C[None])[0]

    def draws(self, random: np.random.Generator, count: int) -> Tensor:
        """float32 [B, X] of labels drawn under the hypothesis that they do not matter."""
        if self.paired:
            pairs = len(self.positive_C) // 2
            signs_BX = random.integers(0, 2, (count, pairs), dtype=np.int8)
            return (torch.from_numpy(signs_BX).float() * 2 - 1) / pairs
        labels_BX = np.broadcast_to(self.positive_C, (count, len(self.positive_C)))
        return self._label_weights(random.permuted(labels_BX, axis=1))

    def _label_weights(self, labels_BX: Mask) -> Tensor:
        share = self.share
        scale = len(self.positive_C) * math.sqrt(share * (1 - share))
        return torch.from_numpy(labels_BX).float() / scale


def effects(features_CF: Tensor, design: Design) -> Tensor:
    """Correlation of each feature with the label, or of pairs, in [-1, 1]: float32 [F]."""
    return (design.weights() @ design.units(features_CF)).clamp(-1, 1)


def cohens_d(effect: float, design: Design) -> float | None:
    """The standardised difference that belongs to an effect; None where nothing varies within the piles."""
    rest = 1 - effect * effect
    if rest < 1e-12:
        return None
    scale = 1.0 if design.paired else design.share * (1 - design.share)
    return float(effect / (rest * scale) ** 0.5)


@dataclass(frozen=True)
class Tested:
    """Two-sided p-values of F features."""

    p_F: Array
    """Each feature alone: (1 + permutations that reach its effect) / (1 + permutations)."""
    q_F: Array
    """Smallest false discovery rate at which it is found (Benjamini and Hochberg 1995)."""
    family_F: Array
    """Whole family: share of permutations whose largest effect over all features reaches it (Westfall and Young 1993);
    controls the chance of any false finding."""
    permutations: int
    """Of the features that took most."""


def permutation_test(features_CF: Tensor, design: Design, seed: int, fdr: float = 0.05) -> Tested:
    """Test every feature with the same permutations; those with small p-values go on until these are resolved.

    A feature is dropped once ENOUGH permutations reached its effect (Besag and Clifford 1991). The others go on to
    twice as many as a single discovery among F features needs, F / fdr, but no more than MOST; or until it is clear
    that nothing can be found any more, however the rest of the permutations fall.
    """
    random = np.random.default_rng(derive_seed(seed, "permutations"))
    units_XF = design.units(features_CF)
    observed_F = (design.weights() @ units_XF).abs() - _TIE
    count = units_XF.shape[1]
    reached_F, tried_F = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    most = min(MOST, max(FIRST, int(2 * count / fdr)))
    open_F, family_F = torch.arange(count), np.ones(count)
    done = 0
    while done < most and len(open_F):
        size = FIRST if done == 0 else min(BATCH, most - done)
        found_BF = (design.draws(random, size) @ units_XF[:, open_F]).abs()
        if done == 0:
            largest_B = found_BF.max(1).values.sort().values
            above_F = size - torch.searchsorted(largest_B, observed_F)
            family_F = ((1 + above_F).double() / (1 + size)).numpy()
        reached_F[open_F] += (found_BF >= observed_F[open_F]).sum(0)
        tried_F[open_F] += size
        done += size
        open_F = open_F[reached_F[open_F] < ENOUGH]
        if not _may_be_found(reached_F, tried_F, open_F, most, fdr):
            break
    p_F = ((1 + reached_F).double() / (1 + tried_F)).numpy()
    return Tested(p_F, false_discovery_control(p_F) if count else p_F, family_F, done)


def _may_be_found(reached_F: Tensor, tried_F: Tensor, open_F: Tensor, most: int, fdr: float) -> bool:
    """Whether anything is found if no further permutation reaches an open feature's effect."""
    at_best_F = tried_F.clone()
    at_best_F[open_F] = most
    p_F = ((1 + reached_F).double() / (1 + at_best_F)).numpy()
    return bool(len(p_F) and false_discovery_control(p_F).min() <= fdr)


def effect_intervals(features_CF: Tensor, design: Design, seed: int) -> list[list[float] | None]:
    """Percentile bootstrap interval of each feature's effect, over conversations within the piles, or over pairs."""
    if design.paired:
        difference_XF = (features_CF[0::2] - features_CF[1::2]).double()
        weights_SX = torch.from_numpy(resample(len(difference_XF), seed))
        mean_SF = weights_SX @ difference_XF
        square_SF = weights_SX @ difference_XF.square()
        samples_SF = mean_SF / (square_SF * len(difference_XF)).sqrt()
    else:
        positive_C = torch.from_numpy(design.positive_C)
        moments = []
        for side, name in ((features_CF[positive_C], 0), (features_CF[~positive_C], 1)):
            weights_SX = torch.from_numpy(resample(len(side), derive_seed(seed, name))) / len(side)
            moments.append((weights_SX @ side.double(), weights_SX @ side.double().square()))
        (mean_p, square_p), (mean_q, square_q) = moments
        p, q = design.share, 1 - design.share
        variance_SF = p * square_p + q * square_q - (p * mean_p + q * mean_q).square()
        samples_SF = (mean_p - mean_q) * (p * q) ** 0.5 / variance_SF.clamp(min=0).sqrt()
    return [interval(column) for column in samples_SF.nan_to_num(0.0, 0.0, 0.0).T.numpy()]


def auroc(scores_C: Array, positive_C: Mask) -> float:
    """Chance that a positive conversation scores above a negative one, ties half."""
    ranks_C = rankdata(scores_C)
    positives, negatives = int(positive_C.sum()), int((~positive_C).sum())
    rank_sum = float(ranks_C[positive_C].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def auroc_interval(scores_C: Array, positive_C: Mask, groups_C: NDArray[np.int64], seed: int) -> list[float] | None:
    """Percentile bootstrap interval of `auroc`, whole groups drawn."""
    weights_SC = resample(int(groups_C.max()) + 1, seed)[:, groups_C]
    order_Q = np.flatnonzero(~positive_C)[np.argsort(scores_C[~positive_C], kind="stable")]
    drawn_SQ = np.cumsum(weights_SC[:, order_Q], axis=1)
    drawn_SQ = np.concatenate([np.zeros((len(drawn_SQ), 1)), drawn_SQ], axis=1)  # of the lowest 0, 1, 2 ... negatives
    ends_2P = [np.searchsorted(scores_C[order_Q], scores_C[positive_C], side) for side in ("left", "right")]
    below_SP = sum(drawn_SQ[:, end_P] for end_P in ends_2P) / 2
    positive_SP = weights_SC[:, positive_C]
    with np.errstate(divide="ignore", invalid="ignore"):
        samples_S = (positive_SP * below_SP).sum(1) / (positive_SP.sum(1) * drawn_SQ[:, -1])
    return interval(samples_S[np.isfinite(samples_S)])
