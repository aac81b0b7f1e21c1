"""Who owns what: the latents of each SAE that each rank trains, as a pure function of recipe and number of ranks.

A checkpoint holds one file for each piece, and any number of ranks puts its own pieces together from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qwenscope.recipe import Recipe

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


def owners(recipe: Recipe, ranks: int) -> list[list[Piece]]:
    """The SAEs of each rank, or its latents of them, in the recipe's order.

    Dealt by latents, the largest first, each to the rank that holds the least; memory and checkpoints follow them. Time
    is evened out by the harvest. Further ranks stay empty.
    """
    most = recipe.training.latents_per_rank
    suite = [cut(sae_id, point.dict_size, most, ranks) for sae_id, point in recipe.hook_points.items()]
    held: list[list[Piece]] = [[] for _ in range(ranks)]
    for pieces in sorted(suite, key=lambda pieces: -pieces[0].latents):
        free = sorted(range(ranks), key=lambda rank: sum(piece.latents for piece in held[rank]))[: len(pieces)]
        for rank, piece in zip(sorted(free), pieces, strict=True):  # a group's ranks are in order, so its latents are
            held[rank].append(piece)
    order = list(recipe.hook_points)
    return [sorted(pieces, key=lambda piece: order.index(piece.sae_id)) for pieces in held]


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
