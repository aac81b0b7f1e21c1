"""Synthetic activations with known features, and how well a dictionary recovers them.

A row is a sparse non-negative combination of known unit directions in superposition (more features F than
dimensions D) plus optional Gaussian noise. Who fires with whom comes in three kinds:

* `sparse`: features fire independently, with Zipf-distributed frequencies;
* `correlated`: the same frequencies, but features in groups of eight tend to fire together (a Gaussian copula with
  one factor per group, so each feature's own frequency is unchanged);
* `hierarchical`: families of one parent and three children; a child fires only where its parent does.

Legend: B rows, D hidden, F known features, N latents. Seed the generator of the truth and the trainer apart: a
decoder drawn from the truth's own random stream starts at the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm
from torch import Tensor

from qwenscope.evaluation.pairs import unit_decoder
from qwenscope.sae.sae import SAE
from qwenscope.seeds import generator

Kind = Literal["sparse", "correlated", "hierarchical", "synth_sae_bench"]
"""The last is a law of its own, in synth_sae_bench.py."""

GROUP = 8  # features that share a factor in the correlated kind
FAMILY = 4  # one parent and three children in the hierarchical kind
CORRELATION = 0.6  # of the copula's Gaussians within a group
CHILD_SHARE = 0.3  # probability that a child fires where its parent does
RECOVERED = 0.9  # cosine above which a feature counts as recovered
STABLE = 0.7  # cosine above which a latent counts as found again under another seed


@dataclass(frozen=True)
class GroundTruth:
    """Known features and the law by which they fire.

    Attributes:
        kind: who fires with whom (see the module's text).
        directions_FD: unit directions, float32.
        frequency_F: probability that each feature fires on a row, float64.
        noise: standard deviation of the Gaussian noise per dimension.
    """

    kind: Kind
    directions_FD: Tensor
    frequency_F: Tensor
    noise: float

    def sample(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw rows; the same seed draws the same rows.

        Returns:
            x_BD: activations, float32 [rows, D].
            coefficients_BF: each feature's coefficient, 0 where it does not fire, float32 [rows, F].
        """
        random = generator(seed, "truth", "rows")
        fires_BF = self._fires(rows, random)
        size_BF = (1 + 0.3 * torch.randn(fires_BF.shape, generator=random)).clamp_(min=0.1)
        coefficients_BF = torch.where(fires_BF, size_BF, 0.0)
        x_BD = coefficients_BF @ self.directions_FD
        if self.noise:
            x_BD += self.noise * torch.randn(x_BD.shape, generator=random)
        return x_BD, coefficients_BF

    def _fires(self, rows: int, random: torch.Generator) -> Tensor:
        features = len(self.frequency_F)
        uniform_BF = torch.rand(rows, features, generator=random, dtype=torch.float64)
        if self.kind == "sparse":
            return uniform_BF < self.frequency_F
        if self.kind == "hierarchical":
            parent_F = torch.arange(features) // FAMILY * FAMILY
            is_parent_F = parent_F == torch.arange(features)
            own_F = torch.where(is_parent_F, self.frequency_F, CHILD_SHARE)
            chosen_BF = uniform_BF < own_F
            return chosen_BF & chosen_BF[:, parent_F]
        threshold_F = torch.from_numpy(norm.isf(self.frequency_F.numpy()))
        factor_BG = torch.randn(rows, -(-features // GROUP), generator=random, dtype=torch.float64)
        factor_BF = factor_BG.repeat_interleave(GROUP, dim=1)[:, :features]
        own_BF = torch.randn(rows, features, generator=random, dtype=torch.float64)
        mixed_BF: Tensor = CORRELATION**0.5 * factor_BF + (1 - CORRELATION) ** 0.5 * own_BF
        return mixed_BF > threshold_F


def ground_truth(
    hidden_dim: int, features: int, *, kind: Kind = "sparse", active: float = 8.0, noise: float = 0.0, seed: int
) -> GroundTruth:
    """Draw directions and frequencies.

    Args:
        hidden_dim: D.
        features: F.
        kind: who fires with whom.
        active: features that fire on a row, on average; below F / 4, so that every frequency is a probability.
        noise: standard deviation of the noise per dimension.
        seed: of directions and frequencies; rows have a seed of their own.

    Raises:
        ValueError: `active` is not in (0, F / 4].
    """
    if not 0 < active <= features / 4:
        raise ValueError(f"active {active} must lie in (0, features / 4 = {features / 4}]")
    random = generator(seed, "truth", "features")
    directions_FD = torch.nn.functional.normalize(torch.randn(features, hidden_dim, generator=random), dim=1)
    rank_F = torch.arange(features, dtype=torch.float64)
    if kind == "hierarchical":
        rank_F = rank_F.div(FAMILY, rounding_mode="floor")
    weight_F = 1 / (rank_F + features / 16)  # Zipf with a plateau: the rarest fire about 1/17 as often as the commonest
    if kind == "hierarchical":
        weight_F[torch.arange(features) % FAMILY != 0] *= CHILD_SHARE
    frequency_F = weight_F * (active / weight_F.sum())
    if float(frequency_F.max()) > 1:
        raise ValueError(f"active {active} makes the commonest feature fire more than always; lower it")
    return GroundTruth(kind, directions_FD, frequency_F, noise)


def recovery(truth: GroundTruth, sae: SAE, *, rows: int, seed: int) -> dict[str, float]:
    """How well the SAE's latents are the known features.

    Args:
        truth: the known features.
        sae: SAE trained on their rows.
        rows: fresh rows on which firing is compared.
        seed: of those rows.

    Returns:
        `mean_max_cosine`: mean over features of the best latent's cosine; `recovered`: share of features whose best
        cosine exceeds 0.9; `matched_cosine` and `matched_f1`: the same features under the one-to-one matching that
        maximises total cosine, and the F1 of the matched latents' firing (value above 0) against the features';
        a feature without a partner counts 0.
    """
    cosine_FN = truth.directions_FD @ unit_decoder(sae).T
    best_F = cosine_FN.max(1).values
    feature_M, latent_M = match(cosine_FN)
    x_BD, coefficients_BF = truth.sample(rows, seed)
    with torch.no_grad():
        fired_BM = sae.encode(x_BD).dense()[:, latent_M] > 0
    fires_BM = coefficients_BF[:, feature_M] > 0
    hits_M = (fired_BM & fires_BM).sum(0).double()
    f1_M = 2 * hits_M / (fired_BM.sum(0) + fires_BM.sum(0)).clamp(min=1)
    features = len(truth.directions_FD)
    return {
        "mean_max_cosine": float(best_F.mean()),
        "recovered": float((best_F > RECOVERED).double().mean()),
        "matched_cosine": float(cosine_FN[feature_M, latent_M].double().sum()) / features,
        "matched_f1": float(f1_M.sum()) / features,
    }


def match(similarity_AB: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """One-to-one matching of rows to columns that maximises total similarity (Hungarian method); min(A, B) pairs."""
    rows, columns = linear_sum_assignment(similarity_AB.cpu().numpy(), maximize=True)
    return rows, columns


def cross_seed_stability(first: SAE, second: SAE) -> dict[str, float]:
    """Agreement of two SAEs trained alike but for the seed: cosines of decoder directions under optimal matching.

    Returns:
        `mean_cosine` of matched latents and `stable`: share of them above 0.7 (as in Paulo and Belrose 2025).
    """
    cosine_NN = unit_decoder(first) @ unit_decoder(second).T
    rows, columns = match(cosine_NN)
    matched = cosine_NN[rows, columns]
    return {"mean_cosine": float(matched.mean()), "stable": float((matched > STABLE).double().mean())}
