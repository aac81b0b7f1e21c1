"""Latents that no longer fire: counted in tokens, and optionally re-initialised from what the SAE explains worst.

A latent fires on a token when its value is above 0 (an index in the top-k with value 0 does not count).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenscope.sae.ops import Panels


class FiringAges:
    """Tokens since each latent last fired.

    tokens_N: int64 [N], 0 for a latent that fired in the last batch.
    """

    def __init__(self, dict_size: int, dead_after_tokens: int, device: torch.device) -> None:
        self.tokens_N = torch.zeros(dict_size, dtype=torch.int64, device=device)
        self.dead_after_tokens = dead_after_tokens

    def update(self, fired_N: Tensor, batch: int, finite: Tensor) -> None:
        """Count one batch, unless `finite` (0-dim bool) is false; `fired_N` is a bool per latent."""
        aged_N = (self.tokens_N + batch).masked_fill_(fired_N, 0)
        torch.where(finite, aged_N, self.tokens_N, out=self.tokens_N)

    def dead(self) -> Tensor:
        """Bool [N]: has not fired for `dead_after_tokens` tokens or more."""
        return self.tokens_N >= self.dead_after_tokens


def longest_dead(tokens_N: Tensor, dead_after_tokens: int) -> Tensor:
    """Latents [M], int64, that have not fired for so many tokens, the longest dead first."""
    dead_N = tokens_N >= dead_after_tokens
    order = tokens_N.masked_fill(~dead_N, -1).argsort(descending=True, stable=True)
    return order[: int(dead_N.sum())]


class ResamplingPool:
    """Residual rows of the recent past, sampled with probability proportional to their loss.

    A ring of the last steps' picks, `per_step` rows each: old rows age out. The ring is part of a trainer's state, so
    that a resumed run resamples the same directions.
    """

    def __init__(self, size: int, hidden_dim: int, per_step: int, device: torch.device) -> None:
        self.rows_PD = torch.zeros(size, hidden_dim, device=device, dtype=torch.float32)
        self.loss_P = torch.zeros(size, device=device, dtype=torch.float32)
        self.per_step = per_step
        self.cursor = 0

    def add(self, rows_BD: Panels | Tensor, loss_B: Tensor, generator: torch.Generator) -> None:
        """Put up to `per_step` distinct rows of this batch into the ring, drawn by loss without replacement."""
        loss_B = torch.where(torch.isfinite(loss_B), loss_B, 0)
        # Exponential race (Efraimidis & Spirakis 2006): the smallest Exp(1) / weight are a weighted draw.
        race_B = (
            torch.empty(loss_B.shape, dtype=torch.float32).exponential_(generator=generator).to(loss_B.device) / loss_B
        )
        picks = race_B.topk(min(self.per_step, len(loss_B)), largest=False).indices
        slots = (self.cursor + torch.arange(len(picks), device=picks.device)) % len(self.loss_P)
        self.rows_PD[slots] = torch.where(loss_B[picks, None] > 0, rows_BD[picks], 0).to(self.rows_PD.dtype)
        self.loss_P[slots] = loss_B[picks].to(self.loss_P.dtype)
        self.cursor = int(self.cursor + len(picks)) % len(self.loss_P)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """At most `count` unit directions [R, D], pairwise distinct, drawn by loss without replacement."""
        directions = torch.nn.functional.normalize(self.rows_PD, dim=1)
        weights = self.loss_P.cpu()
        race = torch.empty(weights.shape, dtype=torch.float32).exponential_(generator=generator) / weights
        order = race.argsort()[: int((weights > 0).sum())]
        chosen = directions[order.to(directions.device)]
        self.loss_P.zero_()  # no row serves twice
        return chosen[_first_of_each(chosen)][:count]


def _first_of_each(rows_PD: Tensor) -> Tensor:
    """Positions, ascending, of the first copy of each distinct row."""
    _, group = torch.unique(rows_PD, dim=0, return_inverse=True)
    positions = torch.arange(len(rows_PD), device=rows_PD.device)
    first = torch.full((len(rows_PD),), len(rows_PD), device=rows_PD.device).scatter_reduce(0, group, positions, "amin")
    return first[first < len(rows_PD)].sort().values
