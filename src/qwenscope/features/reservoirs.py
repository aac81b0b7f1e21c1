"""The best examples of every latent at once, and uniform samples: tables on tensors, no loop over latents.

A table keeps, for each of N latents, the M entries with the largest keys seen so far. With activations as keys it holds
the top examples; with random numbers as keys it holds a uniform sample of the latent's firings (Li 1994's reservoir by
keys). Entries of a latent's first M candidates fill the table; afterwards a candidate must beat the latent's floor, so
that the work per batch shrinks as the table fills.

Legend: N latents, M entries per latent, W window positions, P candidates, S candidates that enter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

Windows = Callable[[Tensor], Tensor]
_ODD = -7046029254386353131  # 2^64 / golden ratio: products of it, which wrap around, spread over all 64 bits


def order_by_group(groups_P: Tensor, keys_P: Tensor) -> Tensor:
    """Indices [P] that sort by group, then by key from large to small, then as they stood.

    groups_P: int64 below 2^31. keys_P: float32, at least 0 or -inf. One sort of integers: the bits of positive floats
    are in their order.
    """
    bits_P = torch.where(keys_P < 0, -1, keys_P.view(torch.int32)).long()
    return torch.sort((groups_P << 32) - bits_P, stable=True).indices


def context_keys(tokens_T: Tensor, conversation_T: Tensor, length: int) -> Tensor:
    """int64 [T], of each token's last `length` tokens up to itself, within its conversation: the same for the same."""
    keys_T = torch.zeros_like(tokens_T)
    for back in range(length):
        there = slice(0, max(0, len(tokens_T) - back))
        inside = conversation_T[back:] == conversation_T[there]
        keys_T *= _ODD
        keys_T[back:] += torch.where(inside, tokens_T[there] + 1, 0)
    return keys_T


def first_of_each(groups_P: Tensor, keys_P: Tensor) -> Tensor:
    """bool [P], True at the largest key of each group (int64 of any size), the first among equals."""
    place_P = torch.unique(groups_P, return_inverse=True)[1]
    order = order_by_group(place_P, keys_P)
    ordered_P = place_P[order]
    first_P = torch.ones(len(order), dtype=torch.bool)
    first_P[1:] = ordered_P[1:] != ordered_P[:-1]
    return torch.zeros_like(first_P).scatter_(0, order, first_P)


class Tensors:
    """Tensors that can be saved by name and taken back."""

    SAVED: ClassVar[dict[str, str]]
    """{name in a saved state: attribute}"""

    def state(self) -> dict[str, Tensor]:
        """Every tensor by name; `load` takes it back."""
        return {name: getattr(self, attribute) for name, attribute in self.SAVED.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""
        for name, attribute in self.SAVED.items():
            setattr(self, attribute, state[name])


class LatentTable(Tensors):
    """M entries per latent with the largest keys, no two of one context; equal keys keep the earlier address.

    keys_NM: float32, -inf where empty. values_NM: float32 activation. addresses_NM: int64, -1 where empty.
    contexts_NM: int64, what stands at and before the address. windows_NMW: float16 activations of the same latent
    around it.
    """

    SAVED: ClassVar = {
        "keys": "keys_NM",
        "values": "values_NM",
        "addresses": "addresses_NM",
        "contexts": "contexts_NM",
        "windows": "windows_NMW",
    }

    def __init__(self, latents: int, entries: int, window: int) -> None:
        self.keys_NM = torch.full((latents, entries), -torch.inf, dtype=torch.float32)
        self.values_NM = torch.zeros(latents, entries, dtype=torch.float32)
        self.addresses_NM = torch.full((latents, entries), -1, dtype=torch.int64)
        self.contexts_NM = torch.zeros(latents, entries, dtype=torch.int64)
        self.windows_NMW = torch.zeros(latents, entries, window, dtype=torch.float16)

    def offer(
        self,
        latents_P: Tensor,
        keys_P: Tensor,
        values_P: Tensor,
        addresses_P: Tensor,
        contexts_P: Tensor,
        windows: Windows,
    ) -> None:
        """Take the candidates that belong among their latent's M best.

        Args:
            latents_P: int64 latent of each candidate.
            keys_P: float32.
            values_P: float32 activations.
            addresses_P: int64 token addresses, ascending among equal latents and larger than any offered before.
            contexts_P: int64, the same for candidates that read the same; see `context_keys`.
            windows: maps indices [S] into the candidates to [S, W] activations; called for those that enter only.
        """
        entries = self.keys_NM.shape[1]
        worthy = (keys_P > self.keys_NM.amin(1)[latents_P]).nonzero().squeeze(1)
        if not len(worthy):
            return
        touched_U, place = torch.unique(latents_P[worthy], return_inverse=True)
        held = len(touched_U) * entries
        rows = torch.cat([torch.arange(len(touched_U)).repeat_interleave(entries), place])
        keys = torch.cat([self.keys_NM[touched_U].flatten(), keys_P[worthy]])
        # Held entries stand first: among equal keys they stay, and then the earlier address.
        order = order_by_group(rows, keys)
        contexts = torch.cat([self.contexts_NM[touched_U].flatten(), contexts_P[worthy]])
        best = first_of_each(rows * _ODD + torch.where(keys == -torch.inf, torch.arange(len(keys)), contexts), keys)
        order = order[best[order]]
        offered_U = torch.bincount(rows[best])  # at least M: an entry goes only where a better one of its context comes
        starts_U = offered_U.cumsum(0) - offered_U
        kept_UM = order[starts_U.unsqueeze(1) + torch.arange(entries)]
        new_UM = kept_UM >= held
        old_UM, fresh = kept_UM.clamp(max=held - 1), worthy[kept_UM[new_UM] - held]
        for table, candidates in (
            (self.keys_NM, keys_P),
            (self.values_NM, values_P),
            (self.addresses_NM, addresses_P),
            (self.contexts_NM, contexts_P),
        ):
            merged_UM = table[touched_U].flatten()[old_UM]
            merged_UM[new_UM] = candidates[fresh]
            table[touched_U] = merged_UM
        windows_UMW = self.windows_NMW[touched_U].flatten(0, 1)[old_UM]
        windows_UMW[new_UM] = windows(fresh).to(torch.float16)
        self.windows_NMW[touched_U] = windows_UMW


class Sample(Tensors):
    """A uniform sample of fixed size over all items offered, each with one tensor of int32 latents (-1: none)."""

    SAVED: ClassVar = {"keys": "keys_S", "addresses": "addresses_S", "latents": "latents_S"}

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        self.keys_S = torch.full((size,), -torch.inf, dtype=torch.float32)
        self.addresses_S = torch.full((size,), -1, dtype=torch.int64)
        self.latents_S = torch.full((size, *shape), -1, dtype=torch.int32)

    def enter(self, keys_P: Tensor) -> tuple[Tensor, Tensor]:
        """(candidates that enter, places they take) for random keys [P]."""
        size = len(self.keys_S)
        chosen = torch.cat([self.keys_S, keys_P]).topk(size).indices
        fresh = chosen[chosen >= size] - size
        gone = torch.ones(size, dtype=torch.bool)
        gone[chosen[chosen < size]] = False
        places = gone.nonzero().squeeze(1)
        return fresh, places

    def put(self, places: Tensor, keys: Tensor, addresses: Tensor, latents: Tensor) -> None:
        """Store items at `places`; latents [..., K] of any K, for which the sample makes room."""
        more = latents.shape[-1] - self.latents_S.shape[-1]
        if more > 0:
            self.latents_S = torch.nn.functional.pad(self.latents_S, (0, more), value=-1)
        latents = torch.nn.functional.pad(latents, (0, max(0, -more)), value=-1)
        self.keys_S[places], self.addresses_S[places] = keys, addresses
        self.latents_S[places] = latents.to(torch.int32)

    @property
    def filled(self) -> Tensor:
        """bool [S], which places hold an item."""
        return self.addresses_S >= 0
