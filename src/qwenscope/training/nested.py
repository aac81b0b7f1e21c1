"""Matryoshka dictionaries (Bussmann et al. 2025, arXiv 2503.17547): the loss is summed over nested prefixes, sparsely.

Prefix l are the latents before `ends[l]`, the last one all of them, and x_hat_l what they decode of a row's active
latents. With g_l = dLoss/dx_hat_l a latent of prefix l and of none before takes part in x_hat_l and all later ones, so
that its code, its decoder row and (l = 0) pre_bias see G_l = g_l + g_(l+1) + ...: L gradients per row, of which each
pair (row, latent) needs one. Matrices [S, D] hold them with S = B * L, the L of a row next to each other.

Legend: B rows (tokens), D hidden, C columns of a panel, N latents, K active latents per row, L prefixes, S = B * L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenscope.errors import TrainingError
from qwenscope.sae import ops
from qwenscope.sae.selection import Selection
from qwenscope.training.weights import Weights


class Nested:
    """The prefixes of one SAE.

    Args:
        prefixes: latents at which they end, rising; the whole dictionary is always one, and need not be named.
        dict_size: N.
        device: of the trainer.

    Raises:
        TrainingError: prefixes that do not rise, or one beyond the dictionary.
    """

    def __init__(self, prefixes: Sequence[int], dict_size: int, device: torch.device) -> None:
        inner = [latents for latents in prefixes if latents != dict_size]
        if inner != sorted(set(inner)) or (inner and not 0 < inner[0] <= inner[-1] < dict_size):
            raise TrainingError(f"prefixes {list(prefixes)} must rise from 1 or more to at most {dict_size}")
        self.ends = (*inner, dict_size)
        self._inner = torch.tensor(inner, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self.ends)

    def described(self) -> dict[str, list[int]]:
        """The key `prefixes` of the SAE's configuration; none of an ordinary dictionary."""
        return {"prefixes": list(self.ends)} if len(self) > 1 else {}

    def errors(self, weights: Weights, selection: Selection, rows: ops.Panels) -> tuple[ops.Panels, Tensor]:
        """Every x_hat_l - x -> [S, D], and the square of the whole dictionary's in each row [B]."""
        if len(self) == 1:
            return weights.errors(selection, rows)
        errors = self._decode(weights, selection)
        for part, subtrahend in zip(errors.parts, rows.parts, strict=True):
            part.view(len(subtrahend), len(self), -1).sub_(subtrahend.unsqueeze(1))
        return errors, self.whole(errors).squares()

    def _decode(self, weights: Weights, selection: Selection) -> ops.Panels:
        """Every x_hat_l -> [S, D]; one gather of the active latents, whatever L is."""
        rows, k = selection.indices.shape
        indices_BK, order_BK = selection.indices.sort(dim=1)
        values_BK = selection.values.gather(1, order_BK)
        inner_BL = torch.searchsorted(indices_BK, self._inner.expand(rows, -1).contiguous())
        starts_BL = F.pad(inner_BL, (1, 0)) + k * torch.arange(rows, device=inner_BL.device).unsqueeze(1)
        parts = []
        for table_NC in ops.cut(weights.decoder):
            bags_SC = F.embedding_bag(
                indices_BK.flatten(),
                table_NC.contiguous(),
                starts_BL.flatten(),
                per_sample_weights=values_BK.flatten().to(table_NC.dtype),
                mode="sum",
            )
            bags_SC = bags_SC.to(weights["pre_bias"].dtype)
            parts.append(bags_SC.view(rows, len(self), -1).cumsum(1).flatten(0, 1))
        return ops.Panels(tuple(parts))

    def whole(self, panels: ops.Panels) -> ops.Panels:
        """Of a matrix [S, D] what belongs to the whole dictionary -> [B, D]."""
        return (
            panels if len(self) == 1 else ops.Panels(tuple(part[len(self) - 1 :: len(self)] for part in panels.parts))
        )

    def loss(self, errors: ops.Panels, fvu: Tensor, variance: Tensor) -> Tensor:
        """The sum of every prefix' FVU; `fvu` is the whole dictionary's."""
        return fvu if len(self) == 1 else errors.squares().sum() / variance

    def gradient(self, errors: ops.Panels, factor: Tensor) -> ops.Panels:
        """G_l, with g_l = `factor` times the error -> [S, D]; takes the errors' place."""
        if len(self) > 1:
            for part in errors.parts:
                levels_BLC = part.view(-1, len(self), part.shape[1])
                for level in range(len(self) - 2, -1, -1):
                    levels_BLC[:, level].add_(levels_BLC[:, level + 1])
        return errors.mul_(factor)

    def norms(self, gradient: ops.Panels, loss_B: Tensor, factor: Tensor) -> Tensor:
        """Norm of each row of what `gradient` returned, given that of a row's error was sqrt(loss) -> [S]."""
        return loss_B.sqrt() * factor if len(self) == 1 else gradient.squares().sqrt()

    def add(self, gradient: ops.Panels, of_whole_BD: Tensor) -> Tensor:
        """Add a further dLoss/dx_hat of the whole dictionary, which is part of every G_l, to what `gradient` returned,
        in place; the norm of each row then [S].
        """
        for part, more in zip(gradient.parts, ops.cut(of_whole_BD), strict=True):
            part.view(len(more), len(self), -1).add_(more.unsqueeze(1))
        return gradient.to(of_whole_BD.dtype).squares().sqrt()

    def towards(self, pairs: ops.Pairs) -> ops.Pairs:
        """The same pairs, each with the row [S] of the G that it needs."""
        if len(self) == 1:
            return pairs
        level_P = torch.bucketize(pairs.latents.long(), self._inner, right=True)
        return replace(pairs, rows=pairs.rows * len(self) + level_P)
