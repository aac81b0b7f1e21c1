"""Adam (Kingma & Ba 2015) on plain tensors or slices of them, equal to `torch.optim.Adam` on the dense gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Adam:
    """One step's Adam settings; call it on each parameter (or block of rows) with its moments.

    step: 0-dim float32 tensor, number of this step from 1 (for the bias corrections).
    divisor: 0-dim float32 tensor that divides every gradient: the clipping.
    skip: 0-dim float32 tensor; 1 leaves parameter and moments as they are (read on the device, without a sync).
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    step: Tensor
    divisor: Tensor
    skip: Tensor

    def __call__(self, parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor) -> None:
        """Update `parameter`, `mean` and `square` in place; `gradient` is spent (scaled in place)."""
        torch._fused_adam_(
            [parameter],
            [gradient],
            [mean],
            [square],
            [],
            [self.step],
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=self.divisor,
            found_inf=self.skip,
        )
