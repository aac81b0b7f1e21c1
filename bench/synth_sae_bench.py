"""SynthSAEBench's law of activations (Chanin and Garriga-Alonso 2026, arXiv 2602.14687), at any size.

Many features in superposition whose firing has a skewed frequency, a hierarchy, mutual exclusion and correlation, and
whose coefficients differ in size and spread. Numbers are those of SynthSAEBench-16k (16,384 features in 768 dimensions,
about 34 active): the paper's, and what its authors' documentation of the benchmark in SAELens adds. Written from these
texts, with random numbers of its own, so that it is the same law and not the same benchmark.

Legend: B rows, D hidden, F known features in order of frequency, R rank, P parents, C children of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import norm
from torch import Tensor
from truth import GroundTruth

from qwenscope.seeds import generator

MOST, LEAST, EXPONENT = 0.4, 5e-4, 0.5  # frequency of the commonest feature, of the rarest, and the Zipf law between
FEATURES_PER_ROOT = 128  # 128 trees of 16,384 features
BRANCHING, DEPTH = 4, 3  # children of a feature, levels below a root
RANK, CORRELATION = 25, 0.1  # of the Gaussian copula's low-rank part, and the standard deviation of its loadings
MEANS = (5.0, 4.0)  # coefficient where it fires, from the commonest feature to the rarest
SPREAD = (0.5, 0.5)  # each feature's standard deviation is the absolute value of such a normal number
BIAS = 0.5  # norm of what every row has
ORTHOGONAL_STEPS, ORTHOGONAL_LR = 100, 3e-4  # Adam on the squared cosines of all pairs of directions


@dataclass(frozen=True)
class SynthSAEBench(GroundTruth):
    """Known features and the law by which they fire.

    Attributes:
        frequency_F: the law's target, float64; what the hierarchy leaves of it is less for deep features.
        chance_F: probability that each feature is drawn, before parents and siblings have their say, float64.
        loading_FR: the copula's low-rank part, float32.
        mean_F: coefficient where a feature fires, on average, float32.
        spread_F: its standard deviation, float32.
        bias_D: what every row has, float32.
    """

    chance_F: Tensor
    loading_FR: Tensor
    mean_F: Tensor
    spread_F: Tensor
    bias_D: Tensor

    def sample(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """As `GroundTruth.sample`."""
        random = generator(seed, "truth", "rows")
        own_F = (1 - self.loading_FR.square().sum(1)).clamp(min=0).sqrt()
        copula_BF = torch.randn(rows, len(own_F), generator=random).mul_(own_F)
        copula_BF += torch.randn(rows, RANK, generator=random) @ self.loading_FR.T
        drawn_BF = copula_BF > torch.from_numpy(norm.isf(self.chance_F.numpy())).float()
        size_BF = torch.randn(drawn_BF.shape, generator=random).mul_(self.spread_F).add_(self.mean_F).relu_()
        coefficients_BF = size_BF.mul_(drawn_BF)
        for parents, children in levels(len(own_F)):
            parent_BP = coefficients_BF[:, parents]
            child_BPC = coefficients_BF[:, children].unflatten(1, (-1, BRANCHING))
            lot_BPC = torch.rand(child_BPC.shape, generator=random).masked_fill_(child_BPC == 0, -1)
            child_BPC *= lot_BPC == lot_BPC.amax(2, keepdim=True)  # siblings exclude each other: one of them by lot
            child_BPC *= (parent_BP / self.mean_F[parents]).unsqueeze(2)
            coefficients_BF[:, children] = child_BPC.flatten(1)
        return coefficients_BF @ self.directions_FD + self.bias_D, coefficients_BF


def levels(features: int) -> list[tuple[slice, slice]]:
    """(parents, children) from the roots on; the children of a parent stand together, in its order. Features after the
    last level belong to no tree."""
    found, parents = [], slice(0, features // FEATURES_PER_ROOT)
    for _ in range(DEPTH):
        children = slice(parents.stop, parents.stop + BRANCHING * (parents.stop - parents.start))
        found.append((parents, children))
        parents = children
    return found


def synth_sae_bench(hidden_dim: int, features: int, *, seed: int) -> SynthSAEBench:
    """Draw directions, correlations and sizes.

    Args:
        hidden_dim: D; 768 in the benchmark.
        features: F; 16,384 there, 21 for each dimension. Trees and all else grow in proportion.
        seed: of the features; rows have a seed of their own.

    Raises:
        ValueError: too few features for a tree.
    """
    if features < FEATURES_PER_ROOT:
        raise ValueError(f"features {features} make no tree; give at least {FEATURES_PER_ROOT}")
    random = generator(seed, "truth", "features")
    rank_F = torch.arange(1, features + 1, dtype=torch.float64) ** -EXPONENT
    frequency_F = LEAST + (MOST - LEAST) * (rank_F - rank_F[-1]) / (rank_F[0] - rank_F[-1])
    chance_F = frequency_F.clone()
    for parents, children in levels(features):
        # Makes up for rows where the parent is silent, and for those where a sibling is expected to win.
        parent_P1, child_PC = frequency_F[parents, None], frequency_F[children].unflatten(0, (-1, BRANCHING))
        siblings_PC = child_PC.sum(1, keepdim=True) - child_PC
        chance_F[children] = (child_PC / parent_P1 * (1 + siblings_PC / parent_P1)).clamp(max=1).flatten()
    bias_D = torch.randn(hidden_dim, generator=random)
    return SynthSAEBench(
        kind="synth_sae_bench",
        directions_FD=nearly_orthogonal(torch.randn(features, hidden_dim, generator=random)),
        frequency_F=frequency_F,
        noise=0.0,
        chance_F=chance_F,
        loading_FR=CORRELATION * torch.randn(features, RANK, generator=random),
        mean_F=torch.linspace(*MEANS, features),
        spread_F=(SPREAD[0] + SPREAD[1] * torch.randn(features, generator=random)).abs(),
        bias_D=BIAS * bias_D / bias_D.norm(),
    )


def nearly_orthogonal(directions_FD: Tensor) -> Tensor:
    """Unit rows whose squared cosines were lowered by gradient steps."""
    unit_FD = torch.nn.functional.normalize(directions_FD, dim=1).requires_grad_()
    optimizer = torch.optim.Adam([unit_FD], lr=ORTHOGONAL_LR)
    for _ in range(ORTHOGONAL_STEPS):
        with torch.no_grad():
            unit_FD.grad = 4 * (unit_FD @ (unit_FD.T @ unit_FD) - unit_FD)  # of the sum over pairs of unit rows
            optimizer.step()
            unit_FD /= unit_FD.norm(dim=1, keepdim=True)
    return unit_FD.detach()
