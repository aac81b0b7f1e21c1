"""The arithmetic of an SAE whose latents are spread over several ranks, because one device cannot hold them all.

Each rank has some of the latents: their rows of encoder and decoder, with moments and counters. pre_bias and the
normalisation are on all, and stay equal because whatever changes them is a sum over the ranks. Of a step, three
things travel:

    values      each rank's K largest of every row to the others: the K largest of them all are the SAE's, exactly
    x_hat       each rank decodes its own active latents; the reconstruction is the sum
    numbers     the gradient of pre_bias, norms and counts

Legend: B rows (tokens), D hidden, N latents of the whole SAE, K active latents, S ranks that share the SAE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qwenscope.parallel.group import ALONE, Group
from qwenscope.parallel.owners import owners
from qwenscope.recipe import Recipe


@dataclass(frozen=True)
class Shard:
    """This rank's latents of an SAE, and how to reach the rest.

    bounds: where each rank's latents begin, and N. k: K of the whole SAE. group: the ranks that share it, in the order
    of their latents.
    """

    bounds: tuple[int, ...]
    k: int
    group: Group = ALONE

    @property
    def start(self) -> int:
        """The first latent of this rank."""
        return self.bounds[self.group.rank]

    @property
    def stop(self) -> int:
        """The latent after its last."""
        return self.bounds[self.group.rank + 1]

    @property
    def dict_size(self) -> int:
        """N."""
        return self.bounds[-1]

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum of all ranks' `value`, the same bits everywhere; `value` itself is spent."""
        if self.group.size == 1:
            return value
        wide = value.float() if value.dtype == torch.bfloat16 else value
        return self.group.all_reduce(wide).to(value.dtype)

    def largest(self, values_BC: Tensor, k: int) -> Tensor:
        """Which of this rank's values are among the k largest of their row over all ranks -> bool [B, C].

        Args:
            values_BC: its largest, at most k of each row.
            k: how many stay; where the ranks have fewer together, all do.
        """
        width = values_BC.shape[1]
        padded_Bk = torch.nn.functional.pad(values_BC, (0, k - width), value=-math.inf)
        all_BC = torch.cat(self.group.all_gather(padded_Bk), dim=1)
        largest_BC = torch.zeros_like(all_BC, dtype=torch.bool).scatter_(1, all_BC.topk(k, sorted=False).indices, True)
        begin = self.group.rank * k
        return largest_BC[:, begin : begin + width]

    def all_gather(self, values_N: Tensor) -> Tensor:
        """The entries of all latents, by latent, on every rank."""
        sizes = self._sizes
        return self.group.all_to_all(values_N.repeat(len(sizes))[:, None], [len(values_N)] * len(sizes), sizes)[:, 0]

    def gather(self, rows_ND: Tensor) -> Tensor:
        """The rows (or entries) of all latents on the group's first rank, none on the others; by way of the host."""
        if self.group.size == 1:
            return rows_ND
        nowhere = [0] * self.group.size
        own = rows_ND.cpu().reshape(len(rows_ND), -1)
        arrived = self.group.all_to_all(own, [len(own), *nowhere[1:]], self._sizes if self.group.leads else nowhere)
        return arrived.view(-1, *rows_ND.shape[1:])

    @property
    def _sizes(self) -> list[int]:
        """Latents of each rank."""
        return [stop - start for start, stop in pairwise(self.bounds)]


def shards(recipe: Recipe, group: Group) -> dict[str, Shard]:
    """This rank's latents of each SAE that it owns, with the ranks that share it; called by all ranks alike."""
    owned = owners(recipe, group.size)
    groups: dict[tuple[int, ...], Group | None] = {}
    own: dict[str, Shard] = {}
    for sae_id, point in recipe.hook_points.items():
        holders = {rank: piece for rank, held in enumerate(owned) for piece in held if piece.sae_id == sae_id}
        ranks = tuple(holders)
        if ranks not in groups:
            groups[ranks] = group.new_group(ranks) if len(ranks) > 1 else ALONE
        if (among := groups[ranks]) is not None and group.rank in ranks:
            own[sae_id] = Shard((0, *(piece.stop for piece in holders.values())), point.k, among)
    return own
