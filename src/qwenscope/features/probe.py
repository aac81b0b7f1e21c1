"""From labels to a direction: a linear probe on a suite's codes, pushed through the decoder.

A logistic regression on codes gives weights w over latents; W_dec^T w is a direction in the residual stream that can be
steered along. Whether the codes hold the label is only known beside a probe on the raw residual stream: both are
cross-validated on the same folds, whole groups (conversations) apart.

Legend: R rows, D hidden, N latents, F features of a probe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwenscope.errors import FormatError
from qwenscope.sae.sae import SAE
from qwenscope.seeds import generator


@dataclass(frozen=True)
class Probe:
    """A probe's direction and how well it reads the label."""

    direction_D: Tensor
    """Unit direction, float32 [D]: towards label 1."""
    latents: list[tuple[int, float]]
    """(latent, weight), the ten largest weights by size."""
    codes_accuracy: float
    """Balanced accuracy of the probe on codes, mean over held-out folds."""
    raw_accuracy: float
    """The same of a probe on the raw residual stream."""
    folds: int


def probe_direction(
    x_RD: Tensor,
    labels_R: Tensor,
    sae: SAE,
    *,
    groups_R: Tensor | None = None,
    folds: int = 5,
    l2: float = 1.0,
    seed: int = 0,
) -> Probe:
    """Fit a probe on all rows, and measure it by cross-validation.

    Args:
        x_RD: residual-stream rows at the SAE's hook point.
        labels_R: bool.
        sae: whose codes are probed.
        groups_R: int; rows of one group are never on both sides of a fold. None takes each row by itself.
        folds: of the cross-validation.
        l2: weight decay of the regressions, on standardised features.
        seed: of the folds.

    Raises:
        FormatError: the sizes do not fit, or a fold would lack one of the labels.
    """
    if len(x_RD) != len(labels_R) or x_RD.shape[1] != sae.hidden_dim:
        raise FormatError(f"{len(labels_R)} labels do not fit rows {tuple(x_RD.shape)} of width {sae.hidden_dim}")
    labels_R = labels_R.bool()
    with torch.no_grad():
        codes_RN = sae.encode(x_RD.float()).dense()
    alive = ((codes_RN > 0).sum(0) > 1).nonzero().squeeze(1)
    groups_R = torch.arange(len(labels_R)) if groups_R is None else groups_R
    fold_R = _folds(labels_R, groups_R, folds, seed)
    codes_RF = codes_RN[:, alive]
    weights_F, _ = _fit(codes_RF, labels_R, l2)
    direction_D = sae.decoder.weight.detach()[:, alive].float() @ weights_F
    largest = weights_F.abs().argsort(descending=True)[:10].tolist()
    return Probe(
        direction_D=torch.nn.functional.normalize(direction_D, dim=0),
        latents=[(int(alive[i]), float(weights_F[i])) for i in largest],
        codes_accuracy=_cross_validated(codes_RF, labels_R, fold_R, folds, l2),
        raw_accuracy=_cross_validated(x_RD.float(), labels_R, fold_R, folds, l2),
        folds=folds,
    )


def _folds(labels_R: Tensor, groups_R: Tensor, folds: int, seed: int) -> Tensor:
    """Fold of each row: groups shuffled, then dealt out in turn, those with positive rows first."""
    names, place_R = torch.unique(groups_R, return_inverse=True)
    positive_G = torch.zeros(len(names), dtype=torch.float32).index_add_(0, place_R, labels_R.float()) > 0
    order_G = torch.randperm(len(names), generator=generator(seed, "probe folds"))
    order_G = order_G[torch.sort(positive_G[order_G].int(), descending=True, stable=True).indices]
    fold_G = torch.empty(len(names), dtype=torch.int64)
    fold_G[order_G] = torch.arange(len(names)) % folds
    fold_R = fold_G[place_R]
    for fold in range(folds):
        held = labels_R[fold_R == fold]
        if not len(held) or bool(held.all()) or not bool(held.any()):
            raise FormatError(
                f"{len(names)} groups do not give {folds} folds with both labels; use more rows or fewer folds"
            )
    return fold_R


def _fit(features_RF: Tensor, labels_R: Tensor, l2: float) -> tuple[Tensor, float]:
    """(weights [F] on the features as they are, bias) of a balanced, L2-regularised logistic regression."""
    features_RF = features_RF.double()
    spread_F, mean_F = torch.std_mean(features_RF, dim=0)
    spread_F = spread_F.clamp(min=1e-8)
    standard_RF = (features_RF - mean_F) / spread_F
    targets_R = labels_R.double()
    share = targets_R.mean()
    rows_R = torch.where(labels_R, 0.5 / share, 0.5 / (1 - share))
    parameters = torch.zeros(features_RF.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores_R = standard_RF @ parameters[:-1] + parameters[-1]
        fit = torch.nn.functional.binary_cross_entropy_with_logits(scores_R, targets_R, rows_R)
        total = fit + l2 / len(targets_R) * parameters[:-1].square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    found = parameters.detach()
    weights_F = found[:-1] / spread_F
    return weights_F.float(), float(found[-1] - (weights_F * mean_F).sum())


def _cross_validated(features_RF: Tensor, labels_R: Tensor, fold_R: Tensor, folds: int, l2: float) -> float:
    accuracies = []
    for fold in range(folds):
        held_R = fold_R == fold
        weights_F, bias = _fit(features_RF[~held_R], labels_R[~held_R], l2)
        right_R = (features_RF[held_R] @ weights_F + bias > 0) == labels_R[held_R]
        of_R = labels_R[held_R]
        accuracies.append((right_R[of_R].float().mean() + right_R[~of_R].float().mean()) / 2)
    return float(torch.stack(accuracies).mean())
