"""The sparse half of a TopK SAE: everything after the top-k touches only the active latents.

Plain tensors, no autograd. Both dictionaries are stored row-major, [N, D], so that one latent is one contiguous row,
and `embedding_bag` (a gather with a weighted sum) is the workhorse of both directions:

    decode           x_hat_b = sum over the latents of a row     -> one bag per row
    row gradients    dW_n    = sum over the rows of a latent     -> one bag per latent, the pairs sorted by latent

The sort is stable and nothing is added atomically: every sum has one order, so a step is deterministic.

Legend: B rows (tokens), D hidden, N latents, K active latents per row, P = B * K pairs (row, latent).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

with (
    warnings.catch_warnings()
):  # torch announces once per process that CSR is in beta; here it is only a way to pass indices
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def weighted_rows(table_ND: Tensor, indices_BK: Tensor, weights_BK: Tensor) -> Tensor:
    """Sum of `weights[b, j] * table[indices[b, j]]` over j -> [B, D]: the sparse decode."""
    return F.embedding_bag(indices_BK, table_ND, per_sample_weights=weights_BK.to(table_ND.dtype), mode="sum")


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs (row, latent) of a batch, sorted by latent.

    order: [P] int64, position of each sorted pair in the flattened [B, K] arrays.
    rows: [P] int64, the row of each sorted pair.
    offsets: [N + 1] int64, where each latent's pairs begin.
    shape: (B, K).
    """

    order: Tensor
    rows: Tensor
    offsets: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, indices_BK: Tensor, dict_size: int) -> Pairs:
        """Sort the pairs of `indices_BK`, int64 latents in [0, dict_size)."""
        # Short keys: the radix sort of torch is several times faster on 16 bits than on 64.
        keys = indices_BK.reshape(-1).to(torch.int16 if dict_size <= 1 << 15 else torch.int32)
        latents, order = torch.sort(keys, stable=True)
        bounds = torch.arange(dict_size + 1, device=keys.device, dtype=torch.int32)
        offsets = torch.searchsorted(latents.to(torch.int32), bounds)
        return cls(order, order // indices_BK.shape[1], offsets, (indices_BK.shape[0], indices_BK.shape[1]))

    def sort(self, values_BK: Tensor) -> Tensor:
        """Values of the pairs in sorted order -> [P]."""
        return values_BK.reshape(-1)[self.order]

    def unsort(self, values_P: Tensor) -> Tensor:
        """The inverse of `sort` -> [B, K]."""
        return torch.empty_like(values_P).scatter_(0, self.order, values_P).view(self.shape)

    def products(self, table_ND: Tensor, x_BD: Tensor) -> Tensor:
        """`table[latent] . x[row]` of each pair, sorted -> [P]: these entries of `table @ x.T` and no others."""
        zeros = x_BD.new_zeros(len(self.rows))
        shape = (len(table_ND), len(x_BD))
        places = torch.sparse_csr_tensor(self.offsets, self.rows, zeros, shape, check_invariants=False)
        return torch.sparse.sampled_addmm(places, table_ND, x_BD.T, beta=0.0).values()

    def totals(self, values_P: Tensor) -> Tensor:
        """Sum of each latent's (sorted) values -> [N]."""
        return torch.segment_reduce(values_P, "sum", offsets=self.offsets, initial=0)

    def latent_rows(self, x_BD: Tensor, weights_P: Tensor, start: int, stop: int) -> Tensor:
        """For latents start..stop the sum of `weight * x[row]` over their pairs -> [stop - start, D].

        With `weights` (sorted) the latents' values, and x the loss's gradient, these are gradient rows of the decoder.
        """
        low, high = self.offsets[[start, stop]].tolist()
        offsets = self.offsets[start : stop + 1] - low
        weights = weights_P[low:high].to(x_BD.dtype)
        return F.embedding_bag(
            self.rows[low:high], x_BD, offsets, per_sample_weights=weights, mode="sum", include_last_offset=True
        )
