"""The sparse half of a TopK SAE: everything after the top-k touches only the active latents.

Plain tensors, no autograd. Both dictionaries are stored row-major, [N, D], so that one latent is one contiguous row,
and `embedding_bag` (a gather with a weighted sum) is the workhorse of both directions:

    decode           x_hat_b = sum over the latents of a row     -> one bag per row
    row gradients    dW_n    = sum over the rows of a latent     -> one bag per latent, the pairs sorted by latent

The sort is stable and nothing is added atomically: every sum has one order, so a step is deterministic.

Legend: B rows (tokens), D hidden, N latents, K active latents per row, P = B * K pairs (row, latent).
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

with (
    warnings.catch_warnings()
):  # torch announces once per process that CSR is in beta; here it is only a way to pass indices
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


HAS_TRITON = importlib.util.find_spec("triton") is not None


def weighted_rows(table_ND: Tensor, indices_BK: Tensor, weights_BK: Tensor) -> Tensor:
    """Sum of `weights[b, j] * table[indices[b, j]]` over j -> [B, D]: the sparse decode."""
    return F.embedding_bag(indices_BK, table_ND, per_sample_weights=weights_BK.to(table_ND.dtype), mode="sum")


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs (row, latent) of a batch, sorted by latent.

    order: [P] int64, position of each sorted pair in the flattened [B, K] arrays.
    latents, rows: [P], the latent (int16 or int32) and the row (int64) of each sorted pair.
    offsets: [N + 1] int64, where each latent's pairs begin.
    shape: (B, K).
    """

    order: Tensor
    latents: Tensor
    rows: Tensor
    offsets: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, indices_BK: Tensor, dict_size: int) -> Self:
        """Sort the pairs of `indices_BK`, int64 latents in [0, dict_size)."""
        # Short keys: the radix sort of torch is several times faster on 16 bits than on 64.
        keys = indices_BK.reshape(-1).to(torch.int16 if dict_size <= 1 << 15 else torch.int32)
        latents, order = torch.sort(keys, stable=True)
        bounds = torch.arange(dict_size + 1, device=keys.device, dtype=torch.int32)
        offsets = torch.searchsorted(latents.to(torch.int32), bounds)
        return cls(order, latents, order // indices_BK.shape[1], offsets, (indices_BK.shape[0], indices_BK.shape[1]))

    def sort(self, values_BK: Tensor) -> Tensor:
        """Values of the pairs in sorted order -> [P]."""
        return values_BK.reshape(-1)[self.order]

    def unsort(self, values_P: Tensor) -> Tensor:
        """The inverse of `sort` -> [B, K]."""
        return torch.empty_like(values_P).scatter_(0, self.order, values_P).view(self.shape)

    def products(self, table_ND: Tensor, x_BD: Tensor) -> Tensor:
        """`table[latent] . x[row]` of each pair, sorted -> [P]: these entries of `table @ x.T` and no others."""
        if x_BD.is_cuda and HAS_TRITON:
            fused_P: Tensor = _triton_ops().products(table_ND, x_BD, self.latents, self.rows)
            return fused_P
        zeros = x_BD.new_zeros(len(self.rows))
        shape = (len(table_ND), len(x_BD))
        places = torch.sparse_csr_tensor(self.offsets, self.rows, zeros, shape, check_invariants=False)
        sampled_P: Tensor = torch.sparse.sampled_addmm(places, table_ND, x_BD.T, beta=0.0).values()
        return sampled_P

    def totals(self, values_P: Tensor) -> Tensor:
        """Sum of each latent's (sorted) values -> [N]."""
        return torch.segment_reduce(values_P, "sum", offsets=self.offsets, initial=0, unsafe=True)

    def latent_rows(self, x_BD: Tensor, weights_P: Tensor, start: int, stop: int) -> Tensor:
        """For latents start..stop the sum of `weight * x[row]` over their pairs -> [stop - start, D].

        With `weights` (sorted) the latents' values, and x the loss's gradient, these are gradient rows of the decoder.
        """
        rows_P, offsets = self.rows, self.offsets
        if stop - start < len(offsets) - 1:  # some of them: reads two offsets on the host, so CPU only
            low, high = offsets[[start, stop]].tolist()
            rows_P, weights_P, offsets = rows_P[low:high], weights_P[low:high], offsets[start : stop + 1] - low
        if x_BD.is_cuda and HAS_TRITON:
            fused_RD: Tensor = _triton_ops().latent_rows(x_BD, rows_P, weights_P, offsets)
            return fused_RD
        weights_P = weights_P.to(x_BD.dtype)
        return F.embedding_bag(
            rows_P, x_BD, offsets, per_sample_weights=weights_P, mode="sum", include_last_offset=True
        )


class DensePairs(Pairs):
    """The same pairs through dense products: on a GPU faster once they are more than a few in a thousand entries."""

    __slots__ = ()

    def products(self, table_ND: Tensor, x_BD: Tensor) -> Tensor:
        """As `Pairs.products`, all of `table @ x.T` made and picked from."""
        return (table_ND @ x_BD.T)[self.latents.long(), self.rows]

    def latent_rows(self, x_BD: Tensor, weights_P: Tensor, start: int, stop: int) -> Tensor:
        """As `Pairs.latent_rows`, the weights spread over an [N, B] matrix."""
        weights_NB = x_BD.new_zeros(len(self.offsets) - 1, len(x_BD))
        weights_NB[self.latents.long(), self.rows] = weights_P.to(x_BD.dtype)
        return weights_NB[start:stop] @ x_BD


def _triton_ops() -> ModuleType:
    """The kernels; imported late because Triton compiles for whatever device is there when it is imported."""
    from qwenscope.sae import triton_ops

    return triton_ops
