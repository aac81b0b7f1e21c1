"""Activation-level fidelity: how well reconstructions match residual-stream rows, from one streaming pass in float64.

Every definition stands in docs/evaluation.md. Rows are sorted into cells by (role, special token or not); cells keep
sums only, and merging cells gives the figures of a role, of the special tokens and of the whole split, so that each
row is read once. A number that does not exist (the FVU of equal rows, the MSE of no rows) is None, never NaN.

Legend: B rows (tokens), D hidden, N latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenscope.sae.sae import Codes

DENSITY_LOG10_EDGES = tuple(round(-6 + 0.25 * step, 2) for step in range(25))


class Moments:
    """Streaming mean and centred sum of squares per dimension, in float64.

    Rows are shifted by the first row seen, centred within their batch, and batches are combined by the parallel
    update of Chan, Golub and LeVeque (1979). The shift makes constant dimensions come out as exactly 0 and keeps all
    digits where the mean is thousands of standard deviations away from 0.

    Attributes:
        count: rows seen.
        shifted_mean_D: mean minus shift, float64.
        deviations_D: sum over rows of (x - mean)^2 per dimension, float64.
    """

    def __init__(self, hidden_dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.shift_D: Tensor | None = None
        self.shifted_mean_D = torch.zeros(hidden_dim, dtype=torch.float64, device=device)
        self.deviations_D = torch.zeros(hidden_dim, dtype=torch.float64, device=device)

    def update(self, x_BD: Tensor) -> None:
        """Add rows [B, D] of any floating dtype; no rows is no change."""
        if not len(x_BD):
            return
        x_BD = x_BD.to(self.deviations_D.device, torch.float64)
        if self.shift_D is None:
            self.shift_D = x_BD[0].clone()
        y_BD = x_BD - self.shift_D
        mean_D = y_BD.mean(0)
        self._combine(len(x_BD), mean_D, (y_BD - mean_D).square_().sum(0))

    def merge(self, other: Moments) -> None:
        """Add all rows that `other` has seen."""
        if other.shift_D is None:
            return
        if self.shift_D is None:
            self.shift_D = other.shift_D.clone()
        self._combine(other.count, other.shifted_mean_D + (other.shift_D - self.shift_D), other.deviations_D)

    def _combine(self, count: int, mean_D: Tensor, deviations_D: Tensor) -> None:
        total = self.count + count
        delta_D = mean_D - self.shifted_mean_D
        self.deviations_D = self.deviations_D + deviations_D + delta_D.square() * (self.count * count / total)
        self.shifted_mean_D = self.shifted_mean_D + delta_D * (count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """Mean per dimension, float64 [D]; zeros before the first row."""
        return self.shifted_mean_D if self.shift_D is None else self.shift_D + self.shifted_mean_D


@dataclass
class _Cell:
    """Sums over the rows of one (role, special) cell, or of several cells merged."""

    moments: Moments
    residual_D: Tensor  # sum of squared residuals per dimension, float64
    cosine: float = 0.0
    norm_ratio: float = 0.0
    nonzero: int = 0  # rows with a norm above 0, the only ones that have a norm ratio
    active: int = 0

    @classmethod
    def empty(cls, hidden_dim: int, device: torch.device | str) -> _Cell:
        return cls(Moments(hidden_dim, device), torch.zeros(hidden_dim, dtype=torch.float64, device=device))

    def update(self, x_BD: Tensor, x_hat_BD: Tensor, active_B: Tensor) -> None:
        x_BD, x_hat_BD = x_BD.double(), x_hat_BD.double()
        self.moments.update(x_BD)
        self.residual_D += (x_BD - x_hat_BD).square_().sum(0)
        norm_B, norm_hat_B = x_BD.norm(dim=1), x_hat_BD.norm(dim=1)
        product_B = norm_B * norm_hat_B
        cosine_B = (x_BD * x_hat_BD).sum(1) / product_B
        ratio_B = torch.where(norm_B > 0, norm_hat_B / norm_B, 0.0)
        sums = torch.where(product_B > 0, cosine_B, 0.0), ratio_B, (norm_B > 0).double(), active_B.double()
        cosine, ratio, nonzero, active = torch.stack([value_B.sum() for value_B in sums]).cpu().tolist()
        self.cosine += cosine
        self.norm_ratio += ratio
        self.nonzero += int(nonzero)
        self.active += int(active)

    def merge(self, other: _Cell) -> None:
        self.moments.merge(other.moments)
        self.residual_D += other.residual_D
        self.cosine += other.cosine
        self.norm_ratio += other.norm_ratio
        self.nonzero += other.nonzero
        self.active += other.active

    def figures(self) -> dict[str, Any]:
        tokens, hidden_dim = self.moments.count, len(self.residual_D)
        residual = float(self.residual_D.sum())
        varying_D = self.moments.deviations_D > 0
        fvu = residual / float(self.moments.deviations_D.sum()) if varying_D.any() else None
        per_dim_D = 1 - self.residual_D[varying_D] / self.moments.deviations_D[varying_D]
        return {
            "tokens": tokens,
            "mse": residual / (tokens * hidden_dim) if tokens else None,
            "fvu": fvu,
            "explained_variance": None if fvu is None else 1 - fvu,
            "explained_variance_per_dim": None if fvu is None else float(per_dim_D.mean()),
            "constant_dimensions": hidden_dim - int(varying_D.sum()),
            "cosine": self.cosine / tokens if tokens else None,
            "norm_ratio": self.norm_ratio / self.nonzero if self.nonzero else None,
            "l0": self.active / tokens if tokens else None,
        }


class Fidelity:
    """Fidelity of one SAE on one split, fed batch by batch.

    Args:
        hidden_dim: D.
        dict_size: N.
        roles: names of the role codes that `update` receives.
        device: where the float64 sums live.
    """

    def __init__(self, hidden_dim: int, dict_size: int, roles: Sequence[str], device: torch.device | str = "cpu"):
        self.hidden_dim, self.roles, self.device = hidden_dim, tuple(roles), device
        self.cells: dict[tuple[int, bool], _Cell] = {}
        self.fired_N = torch.zeros(dict_size, dtype=torch.int64, device=device)

    def update(self, x_BD: Tensor, codes: Codes, x_hat_BD: Tensor, roles_B: Tensor, special_B: Tensor) -> None:
        """Add rows.

        Args:
            x_BD: residual-stream rows [B, D], any floating dtype.
            codes: their codes; latents count as active where the value is above 0.
            x_hat_BD: their reconstructions [B, D].
            roles_B: role codes [B], indices into `roles`.
            special_B: True where the token is one of the tokenizer's added (control) tokens [B].
        """
        on_BK = codes.values > 0
        active_B = on_BK.sum(1)
        self.fired_N.index_add_(0, codes.indices.flatten().to(self.device), on_BK.flatten().long().to(self.device))
        keys_B = roles_B.long() * 2 + special_B.long()
        for key in sorted(set(keys_B.cpu().tolist())):
            rows = (keys_B == key).nonzero().squeeze(1)
            cell = self.cells.setdefault((key // 2, bool(key % 2)), _Cell.empty(self.hidden_dim, self.device))
            cell.update(x_BD[rows], x_hat_BD[rows], active_B[rows])

    def _merged(self, cells: Iterable[_Cell]) -> _Cell:
        total = _Cell.empty(self.hidden_dim, self.device)
        for cell in cells:
            total.merge(cell)
        return total

    @property
    def tokens(self) -> int:
        """Rows seen."""
        return sum(cell.moments.count for cell in self.cells.values())

    @property
    def spread(self) -> float | None:
        """Root of the mean squared deviation of the rows' elements from their means; None before the first row."""
        moments = self._merged(cell for _, cell in sorted(self.cells.items())).moments
        return float((moments.deviations_D.mean() / moments.count).sqrt()) if moments.count else None

    def figures(self) -> dict[str, Any]:
        """All figures as JSON-able values: those of the split at top level, those of roles and special tokens below."""
        special = self._merged(cell for (_, is_special), cell in self.cells.items() if is_special).figures()
        roles = {
            name: self._merged(cell for (role, _), cell in self.cells.items() if role == code).figures()
            for code, name in enumerate(self.roles)
            if any(role == code for role, _ in self.cells)
        }
        whole = self._merged(cell for _, cell in sorted(self.cells.items())).figures()
        dead = int((self.fired_N == 0).sum())
        return whole | {
            "dead_fraction": dead / len(self.fired_N),
            "dead_latents": dead,
            "dead_window_tokens": whole["tokens"],
            "density": density_histogram(self.fired_N, whole["tokens"]),
            "mse_special_tokens": special["mse"],
            "special_tokens": special,
            "roles": roles,
        }


def density_histogram(fired_N: Tensor, tokens: int) -> dict[str, Any]:
    """Histogram of log10 firing frequency (share of tokens on which a latent is above 0).

    Args:
        fired_N: tokens on which each latent fired, integers [N].
        tokens: tokens seen.

    Returns:
        `log10_edges` (25), `counts` (24 bins; rarer than the first edge falls in the first bin) and `never`.
    """
    fired = fired_N[fired_N > 0].cpu().numpy()
    frequency = np.clip(np.log10(fired / max(tokens, 1)), DENSITY_LOG10_EDGES[0], DENSITY_LOG10_EDGES[-1])
    counts, _ = np.histogram(frequency, bins=np.array(DENSITY_LOG10_EDGES))
    return {
        "log10_edges": list(DENSITY_LOG10_EDGES),
        "counts": counts.tolist(),
        "never": int((fired_N == 0).sum()),
    }
