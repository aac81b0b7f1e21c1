"""The sparse half of a TopK SAE: everything after the top-k touches only the active latents.

Legend: B rows (tokens), D hidden, N latents, K active latents per row, P = B*K pairs (row, latent).
All functions take plain tensors and work on CPU and CUDA. Both dictionaries are stored row-major, [N, D], so that one
latent is one contiguous row; `embedding_bag` (a gather with a weighted sum) is the workhorse of both directions:

    decode           x_hat_B = sum over the latents of a row     -> one bag per row
    row gradients    dW_n    = sum over the rows of a latent     -> one bag per latent, after sorting the pairs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def weighted_rows(table_ND: Tensor, indices_BK: Tensor, weights_BK: Tensor) -> Tensor:
    """Sum of `weights[b, j] * table[indices[b, j]]` over j -> [B, D]: the sparse decode."""
    return F.embedding_bag(indices_BK, table_ND, per_sample_weights=weights_BK, mode="sum")


def sampled_products(x_BD: Tensor, table_ND: Tensor, indices_BK: Tensor) -> Tensor:
    """`x[b] . table[indices[b, j]]` -> [B, K]: the entries of `x @ table.T` at the given places, and no others."""
    return torch.bmm(table_ND[indices_BK], x_BD.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The active pairs of a batch, sorted by latent (stable, so sums have one order and a step is deterministic).

    order: [P] int64, position of each sorted pair in the flattened [B, K] arrays.
    rows: [P] int64, the row of each sorted pair.
    offsets: [N + 1] int64, where each latent's pairs begin.
    """

    order: Tensor
    rows: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, indices_BK: Tensor, dict_size: int) -> Pairs:
        """Sort the pairs of `indices_BK` (latents in [0, dict_size))."""
        flat = indices_BK.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=dict_size)
        offsets = F.pad(torch.cumsum(counts, 0), (1, 0))
        return cls(order, order // indices_BK.shape[1], offsets)

    def latent_rows(self, x_BD: Tensor, weights_P: Tensor, start: int, stop: int) -> Tensor:
        """Gradient rows of latents start..stop: sums of `weight * x[row]` over their pairs -> [stop-start, D].

        `weights_P` is in sorted order.
        """
        low, high = int(self.offsets[start]), int(self.offsets[stop])
        offsets = self.offsets[start : stop + 1] - low
        return F.embedding_bag(
            self.rows[low:high],
            x_BD,
            offsets,
            per_sample_weights=weights_P[low:high],
            mode="sum",
            include_last_offset=True,
        )
