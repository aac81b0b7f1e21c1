"""An SAE whose latents are spread over several ranks, because one device cannot hold them all.

Each rank has some of the latents: their rows of encoder and decoder, with moments and counters. pre_bias and the
normalisation are on all, and stay equal because whatever changes them is a total over the ranks. Of a step, three
things travel:

    values      each rank's K largest of every row to the others: the K largest of them all are the SAE's, exactly
    x_hat       each rank decodes its own active latents; the reconstruction is the total
    numbers     the gradient of pre_bias, norms and counts

Legend: B rows (tokens), D hidden, N latents of the whole SAE, K active latents, S ranks that share the SAE.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qwenscope.ranks import ALONE, Group
from qwenscope.sae.sae import TopKSAE

_ALIGNED = 8  # latents: the two-stage top-k works on groups of that many columns
_BY_LATENT = ("encoder", "decoder", "ages", "candidates")


@dataclass(frozen=True)
class Piece:
    """The latents start..stop of an SAE of `dict_size`: what one rank owns of it."""

    sae_id: str
    start: int
    stop: int
    dict_size: int

    @property
    def latents(self) -> int:
        """How many there are."""
        return self.stop - self.start

    @property
    def stem(self) -> str:
        """The name of its file in a checkpoint: the SAE's, with the latents if they are not all."""
        return self.sae_id if self.latents == self.dict_size else f"{self.sae_id}@{self.start}-{self.stop}"


def cut(sae_id: str, dict_size: int, most: int | None, ranks: int) -> list[Piece]:
    """The pieces of an SAE, all about as large: as few as hold `most` latents each, no more than there are ranks."""
    count = 1 if most is None else min(ranks, math.ceil(dict_size / most))
    bounds = [dict_size * index // count // _ALIGNED * _ALIGNED for index in range(count)] + [dict_size]
    return [Piece(sae_id, start, stop, dict_size) for start, stop in pairwise(bounds)]


def shared(held: Iterable[Iterable[Piece]]) -> bool:
    """Whether several ranks have latents of one SAE."""
    return any(piece.latents < piece.dict_size for pieces in held for piece in pieces)


def overlaps(stem: str, piece: Piece) -> bool:
    """Whether a checkpoint's file holds latents of `piece`."""
    sae_id, start, stop = _latents(stem)
    return sae_id == piece.sae_id and start < piece.stop and stop > piece.start


def state_of(piece: Piece, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The trainer's state of `piece`, put together from a checkpoint's {stem: tensors} of other pieces of the SAE."""
    parts = {_latents(stem)[1]: part for stem, part in tensors.items() if overlaps(stem, piece)}
    first = min(parts)
    state = dict(parts[first])
    for name, rows in state.items():
        if name.startswith(_BY_LATENT):
            whole = torch.cat([parts[start][name] for start in sorted(parts)]) if len(parts) > 1 else rows
            state[name] = whole[piece.start - first : piece.stop - first]
    return state


def _latents(stem: str) -> tuple[str, int, float]:
    """(SAE id, first latent, the one after the last) of a checkpoint's file; infinity where it holds all."""
    sae_id, _, latents = stem.partition("@")
    start, _, stop = latents.partition("-")
    return sae_id, int(start or 0), int(stop) if stop else math.inf


@dataclass(frozen=True)
class Shard:
    """This rank's latents of an SAE, and how to reach the rest.

    bounds: where each rank's latents begin, and N. k: K of the whole SAE. group: the ranks that share it, in the order
    of their latents.
    """

    bounds: tuple[int, ...]
    k: int
    group: Group = ALONE

    @classmethod
    def whole(cls, sae: TopKSAE) -> Shard:
        """All latents are here."""
        return cls((0, sae.dict_size), sae.k)

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

    def total(self, value: Tensor) -> Tensor:
        """The sum of all ranks' `value`, the same bits everywhere; `value` itself is spent."""
        if self.group.size == 1:
            return value
        wide = value.float() if value.dtype == torch.bfloat16 else value
        return self.group.total(wide).to(value.dtype)

    def once(self, value: Tensor) -> Tensor:
        """What all ranks have alike, where it must count once: `value` on the first of them, 0 on the others."""
        return value if self.group.leads else torch.zeros_like(value)

    def norm(self, own: Tensor) -> Tensor:
        """The norm over all ranks, from each one's own."""
        return own if self.group.size == 1 else torch.stack(self.group.gather(own)).norm()

    def largest(self, values_BC: Tensor, k: int) -> Tensor:
        """Which of this rank's values are among the k largest of their row over all ranks -> bool [B, C].

        Args:
            values_BC: its largest, at most k of each row.
            k: how many stay; where the ranks have fewer together, all do.
        """
        width = values_BC.shape[1]
        padded_Bk = torch.nn.functional.pad(values_BC, (0, k - width), value=-math.inf)
        all_BC = torch.cat(self.group.gather(padded_Bk), dim=1)
        largest_BC = torch.zeros_like(all_BC, dtype=torch.bool).scatter_(1, all_BC.topk(k, sorted=False).indices, True)
        begin = self.group.rank * k
        return largest_BC[:, begin : begin + width]

    def of_all(self, values_N: Tensor) -> Tensor:
        """The entries of all latents, by latent, on every rank."""
        sizes = self._sizes
        return self.group.exchange(values_N.repeat(len(sizes))[:, None], [len(values_N)] * len(sizes), sizes)[:, 0]

    def collect(self, rows_ND: Tensor) -> Tensor:
        """The rows of all latents on the group's first rank, none on the others; by way of the host's memory."""
        if self.group.size == 1:
            return rows_ND
        nowhere = [0] * self.group.size
        return self.group.exchange(
            rows_ND.cpu(), [len(rows_ND), *nowhere[1:]], self._sizes if self.group.leads else nowhere
        )

    @property
    def _sizes(self) -> list[int]:
        """Latents of each rank."""
        return [stop - start for start, stop in pairwise(self.bounds)]
