"""What one SAE's latents do on a corpus: counts, histograms, examples, in bounded memory whatever the corpus' length.

Legend: R rows (kept tokens of a chunk), T tokens of a chunk (left-out ones too), K active latents per row, N latents,
P pairs (row, latent) that fire, F context columns (splits, roles, experts), H histogram bins, W window positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qwenscope.features.reservoirs import LatentTable, Sample, Tensors, first_of_each
from qwenscope.sae import ops
from qwenscope.sae.sae import SAE, Codes
from qwenscope.seeds import generator

BEFORE, AFTER = 31, 16
WINDOW = BEFORE + 1 + AFTER
TOP = 20
FIRINGS = 40
"""Firings per latent that are sampled uniformly; quantile examples are drawn from those that are no top examples."""
BACKGROUND = 192
"""Random windows of text; a latent's negatives are those in which it does not fire."""
COACTIVE = 65_536
"""Tokens sampled for co-activation."""
OCTAVES = (-12, 12)
BINS_PER_OCTAVE = 4
BINS = (OCTAVES[1] - OCTAVES[0]) * BINS_PER_OCTAVE
ENCODE_ROWS = 1024
_SAMPLES = ("top", "firings", "background", "coactive")


@dataclass(frozen=True)
class Chunk:
    """The tokens of some whole conversations, all SAEs alike.

    token_R: int64, index of each row among the chunk's T tokens. row_T: int64, the row of each token, -1 if left out.
    conversation_T: int64, conversation of each token. context_T: int64, the same for tokens that are shown alike.
    start: address of the chunk's first token. number: 0, 1, ...
    """

    number: int
    start: int
    token_R: Tensor
    row_T: Tensor
    conversation_T: Tensor
    context_T: Tensor


class LatentStatistics(Tensors):
    """Running statistics of one SAE."""

    SAVED: ClassVar = {
        "fired": "fired_N",
        "total": "total_N",
        "histogram": "histogram_NH",
        "context": "context_NF",
        "base": "base_F",
    }

    def __init__(self, sae: SAE, columns: int, seed: int, name: str) -> None:
        """`columns` is F; `seed` and `name` govern the samples."""
        n = sae.dict_size
        self._sae, self._seed, self._name = sae, seed, name
        self.rows = 0
        self.fired_N = torch.zeros(n, dtype=torch.int64)
        self.total_N = torch.zeros(n, dtype=torch.float64)
        self.histogram_NH = torch.zeros(n, BINS, dtype=torch.int32)
        self.context_NF = torch.zeros(n, columns, dtype=torch.int32)
        self.base_F = torch.zeros(columns, dtype=torch.int64)
        self.top = LatentTable(n, TOP, WINDOW)
        self.firings = LatentTable(n, FIRINGS, WINDOW)
        self.background = Sample(BACKGROUND, (WINDOW, 0))
        self.coactive = Sample(COACTIVE, (0,))

    @torch.no_grad()
    def update(self, x_RD: Tensor, chunk: Chunk, context_RF: Tensor) -> None:
        """Add a chunk: its residual-stream rows at this SAE's hook point, and their context columns (0 or 1)."""
        codes = Codes.cat([self._sae.encode(part) for part in torch.split(x_RD, ENCODE_ROWS)])
        values_RK, indices_RK = codes.values.float().cpu(), codes.indices.cpu()
        active_RK = values_RK > 0
        self.rows += len(x_RD)
        self.base_F += context_RF.sum(0).long()
        self._count(values_RK, indices_RK, active_RK, context_RF)
        latents_RK = torch.where(active_RK, indices_RK, -1).to(torch.int32)
        random = generator(self._seed, "features", self._name, chunk.number)
        row_P, place_P = active_RK.nonzero(as_tuple=True)
        latent_P, value_P = indices_RK[row_P, place_P], values_RK[row_P, place_P]
        token_P = chunk.token_R[row_P]
        address_P, context_P = token_P + chunk.start, chunk.context_T[token_P]
        firings = Firings(latent_P, token_P, value_P, chunk)

        self.firings.offer(
            latent_P,
            torch.rand(len(latent_P), generator=random, dtype=torch.float32),
            value_P,
            address_P,
            context_P,
            lambda chosen_S: firings.windows(latent_P[chosen_S], token_P[chosen_S]),
        )
        worthy = (value_P > self.top.keys_NM.amin(1)[latent_P]).nonzero().squeeze(1)
        conversation_P = chunk.conversation_T[token_P[worthy]]
        best = worthy[first_of_each(latent_P[worthy] * (len(chunk.row_T) + 1) + conversation_P, value_P[worthy])]
        latent_B, value_B, token_B = latent_P[best], value_P[best], token_P[best]
        self.top.offer(
            latent_B,
            value_B,
            value_B,
            address_P[best],
            context_P[best],
            lambda chosen_S: firings.windows(latent_B[chosen_S], token_B[chosen_S]),
        )
        self._sample(latents_RK, chunk, random)

    def _count(self, values_RK: Tensor, indices_RK: Tensor, active_RK: Tensor, context_RF: Tensor) -> None:
        n = len(self.fired_N)
        latent_P, value_P = indices_RK[active_RK], values_RK[active_RK]
        self.fired_N += torch.bincount(latent_P, minlength=n)
        self.total_N += torch.bincount(latent_P, weights=value_P.double(), minlength=n)
        cells_P = latent_P * BINS + bin_of(value_P)
        self.histogram_NH += torch.bincount(cells_P, minlength=n * BINS).view(n, BINS).to(torch.int32)
        pairs = ops.Pairs.of(indices_RK, n)
        weights_P = pairs.sort(active_RK.float())
        self.context_NF += pairs.latent_rows(context_RF, weights_P, 0, n).to(torch.int32)

    def _sample(self, latents_RK: Tensor, chunk: Chunk, random: torch.Generator) -> None:
        """Offer every row to the two samples of text."""
        keys_R = torch.rand(len(latents_RK), generator=random, dtype=torch.float32)
        fresh, places = self.coactive.enter(keys_R)
        self.coactive.put(places, keys_R[fresh], chunk.token_R[fresh] + chunk.start, latents_RK[fresh])
        keys_R = torch.rand(len(latents_RK), generator=random, dtype=torch.float32)
        fresh, places = self.background.enter(keys_R)
        token_S = chunk.token_R[fresh]
        rows_SW = _window_rows(token_S, chunk)
        latents_SWK = torch.where(rows_SW.unsqueeze(2) >= 0, latents_RK[rows_SW.clamp(min=0)], -1)
        self.background.put(places, keys_R[fresh], token_S + chunk.start, latents_SWK)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed pass needs, as flat named tensors."""
        tensors = {"rows": torch.tensor(self.rows), **super().state()}
        for name in _SAMPLES:
            tensors |= {f"{name}.{key}": value for key, value in getattr(self, name).state().items()}
        return tensors

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""
        super().load(state)
        self.rows = int(state["rows"])
        for name in _SAMPLES:
            prefix = f"{name}."
            getattr(self, name).load({key.removeprefix(prefix): value for key, value in state.items()})


def bin_of(values: Tensor) -> Tensor:
    """Histogram bin of positive activations: BINS_PER_OCTAVE per factor of 2; the end bins take the rest."""
    return ((values.log2() - OCTAVES[0]) * BINS_PER_OCTAVE).floor().clamp(0, BINS - 1).long()


def _window_rows(token_S: Tensor, chunk: Chunk) -> Tensor:
    """Rows [S, W] of the tokens around each of `token_S`; -1 outside the conversation and for left-out tokens."""
    tokens_SW = token_S.unsqueeze(1) + torch.arange(-BEFORE, AFTER + 1)
    inside_SW = (tokens_SW >= 0) & (tokens_SW < len(chunk.row_T))
    tokens_SW = tokens_SW.clamp(0, len(chunk.row_T) - 1)
    inside_SW &= chunk.conversation_T[tokens_SW] == chunk.conversation_T[token_S].unsqueeze(1)
    return torch.where(inside_SW, chunk.row_T[tokens_SW], -1)


class Firings:
    """Every firing of a chunk by latent and token, so that those around one stand beside it.

    Args:
        latent_P, token_P: int64, each pair once, in any order. value_P: float32.
    """

    def __init__(self, latent_P: Tensor, token_P: Tensor, value_P: Tensor, chunk: Chunk) -> None:
        self._stride = len(chunk.row_T) + WINDOW  # so that another latent's keys are out of reach
        self._keys_P, order_P = (latent_P * self._stride + token_P).sort()
        self._values_P, self._conversation_T = value_P[order_P], chunk.conversation_T

    def windows(self, latent_S: Tensor, token_S: Tensor) -> Tensor:
        """Activations [S, W] of each latent around a token that it fires on, within the conversation."""
        key_S = latent_S * self._stride + token_S
        place_S = torch.searchsorted(self._keys_P, key_S)
        window_SW = torch.zeros(len(key_S), WINDOW, dtype=torch.float32)
        window_SW[:, BEFORE] = self._values_P[place_S]
        for direction, reach in ((-1, BEFORE), (1, AFTER)):
            near_S, steps = torch.arange(len(key_S)), 0
            while len(near_S):
                steps += direction
                there_S = place_S[near_S] + steps
                near_S = near_S[(there_S >= 0) & (there_S < len(self._keys_P))]
                there_S = place_S[near_S] + steps
                away_S = self._keys_P[there_S] - key_S[near_S]
                near_S = near_S[inside := away_S.abs() <= reach]
                there_S, away_S = there_S[inside], away_S[inside]
                own_S = self._conversation_T[token_S[near_S]] == self._conversation_T[token_S[near_S] + away_S]
                near_S, there_S, away_S = near_S[own_S], there_S[own_S], away_S[own_S]
                window_SW[near_S, BEFORE + away_S] = self._values_P[there_S]
        return window_SW
