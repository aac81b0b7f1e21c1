"""The stand-in's optimiser: Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Muon:
    """Momentum whose update of each matrix is orthogonalised by Newton-Schulz iterations; equal shapes go in one batch.

    The update has the size of an Adam step (0.2 per entry, root mean square; Liu et al. 2025, "Muon is scalable").
    """

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            self.by_shape.setdefault(tuple(parameter.shape[-2:]), []).append(parameter)
        self.averages = {id(p): torch.zeros_like(p) for group in self.by_shape.values() for p in group}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update all parameters [..., rows, columns] from their gradients."""
        for shape, parameters in self.by_shape.items():
            directions = []
            for parameter in parameters:
                assert parameter.grad is not None
                average = self.averages[id(parameter)]
                average.lerp_(parameter.grad, 1 - self.momentum)
                directions.append(parameter.grad.lerp(average, self.momentum).reshape(-1, *shape))  # Nesterov
            updates = torch.split(orthogonalise(torch.cat(directions)), [len(direction) for direction in directions])
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - lr * self.weight_decay)
                parameter.add_(update.view_as(parameter), alpha=-0.2 * lr * max(shape) ** 0.5)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Roughly U V^T of each matrix U S V^T in [batch, rows, columns] (five quintic Newton-Schulz iterations)."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: torch.Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(-4.7750 * gram, gram, gram, alpha=2.0315) @ x
    return x.mT if tall else x


class StandinOptimizer:
    """Muon for matrices at least 32 wide and high, except the embedding; AdamW without decay for the rest."""

    def __init__(self, model: nn.Module) -> None:
        matrices = [
            p for name, p in model.named_parameters() if min(p.shape[-2:]) >= 32 and p.dim() > 1 and "embed" not in name
        ]
        chosen = {id(parameter) for parameter in matrices}
        self.muon = Muon(matrices)
        others: list[Any] = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.parameters = [*matrices, *others]

    def step(self, lr: float) -> None:
        """One update at learning rate `lr` from the gradients (clipped to norm 1), which are then dropped."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.muon.step(lr)
        for parameter in self.parameters:
            parameter.grad = None
