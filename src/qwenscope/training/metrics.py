"""What a step reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step saw, before its update. All but `lr` are 0-dim tensors on the trainer's device (reading one syncs).

    fvu: fraction of variance unexplained of the batch. loss: fvu + aux_coefficient * aux_loss. aux_loss: 0 without
    dead latents. l0: mean number of values above 0 per row. dead: number of dead latents. grad_norm: of all parameters,
    after the decoder's projection, before clipping. finite: whether loss and gradients were; if not, only counters
    changed. kl: what a `Downstream` said, else None; no part of `loss`, to which it is scaled.
    """

    fvu: Tensor
    loss: Tensor
    aux_loss: Tensor
    l0: Tensor
    dead: Tensor
    grad_norm: Tensor
    finite: Tensor
    lr: float
    kl: Tensor | None = None
