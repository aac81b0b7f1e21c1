"""The sparse half of a TopK SAE: everything after the top-k touches only the active latents.

Plain tensors, no autograd. Both dictionaries are stored row-major, [N, D], so that one latent is one contiguous row,
and `embedding_bag` (a gather with a weighted sum) is the workhorse of both directions:

    decode           x_hat_b = sum over the latents of a row     -> one bag per row
    row gradients    dW_n    = sum over the rows of a latent     -> one bag per latent, the pairs sorted by latent

The sort is stable and nothing is added atomically: every sum has one order, so a step is deterministic.

On a CPU whatever is gathered from is cut into panels of columns first: all rows of one panel fit the cache, whole rows
do not, and gathers from memory are two to three times slower.

Legend: B rows (tokens), D hidden, C columns of a panel, N latents, K active latents per row, P = B * K pairs (row,
latent).
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


_HAS_TRITON = importlib.util.find_spec("triton") is not None
PANEL_COLUMNS = 128
_CACHE_BYTES_PER_S, _BYTES_PER_S, _FLOP_PER_S = 5.5e12, 4.3e12, 790e12


@dataclass(frozen=True, slots=True)
class Panels:
    """A matrix [B, D] as contiguous panels [B, C] of its columns; one panel of all columns on a GPU."""

    parts: tuple[Tensor, ...]

    @classmethod
    def of(cls, x: Panels | Tensor) -> Panels:
        """Cut (and so copy) a matrix [B, D]; panels stay what they are."""
        return x if isinstance(x, Panels) else cls(tuple(part.contiguous() for part in cut(x)))

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Some of the rows, whole -> [R, D]."""
        return torch.cat([part[rows] for part in self.parts], dim=1) if len(self.parts) > 1 else self.parts[0][rows]

    def to(self, dtype: torch.dtype) -> Panels:
        """The same numbers in another dtype (itself, if it has that one)."""
        return Panels(tuple(part.to(dtype) for part in self.parts))

    def squares(self) -> Tensor:
        """Sum of squares of each row -> [B]."""
        return torch.stack([torch.linalg.vecdot(part, part) for part in self.parts]).sum(0)

    def spread(self) -> tuple[Tensor, Tensor]:
        """Sum of squared deviations from the mean of the rows, and sum of squares, both 0-dim."""
        deviation = torch.stack([(part - part.mean(0)).square_().sum() for part in self.parts]).sum()
        return deviation, self.squares().sum()

    def sub_(self, other: Panels) -> Self:
        """Subtract another matrix [B, D], in place."""
        for part, subtrahend in zip(self.parts, other.parts, strict=True):
            part.sub_(subtrahend)
        return self

    def mul_(self, factor: Tensor) -> Self:
        """Multiply by a number (0-dim), in place."""
        for part in self.parts:
            part.mul_(factor)
        return self


def cut(x_BD: Tensor) -> tuple[Tensor, ...]:
    """The columns of a matrix (or the entries of a vector [D]) in panels, as views."""
    return torch.split(x_BD, x_BD.shape[-1] if x_BD.is_cuda else PANEL_COLUMNS, dim=-1)


def joined(parts: list[Tensor]) -> Tensor:
    """One after the other along the first dimension; a single one as it is."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def fused(x: Tensor) -> bool:
    """Whether a Triton kernel works on `x`, or `x` in bfloat16: on a GPU, unless sums are to be in float64."""
    return x.is_cuda and _HAS_TRITON and x.dtype != torch.float64


def product_pays(n: int, d: int, k: int) -> bool:
    """Whether a GPU decodes sooner by one product of all N latents, mostly with 0, than by gathering k rows of width D.

    Per row, by an H200's rates on paper, in bfloat16: 2 k D bytes gathered from the L2 cache against 2 N D operations,
    N codes written and read, and a sum in float32 written and read.
    """
    gathered = 2 * k * d / _CACHE_BYTES_PER_S
    return gathered > 2 * n * d / _FLOP_PER_S + (4 * n + 8 * d) / _BYTES_PER_S


def product(codes_BN: Tensor, table_ND: Tensor) -> Tensor:
    """Codes times table, both bfloat16, summed and returned in float32 [B, D]."""
    if codes_BN.is_cuda:
        return torch.mm(codes_BN, table_ND, out_dtype=torch.float32)
    return codes_BN.float() @ table_ND.float()


def decode(table_ND: Tensor, indices_BK: Tensor, weights_BK: Tensor) -> Panels:
    """As `weighted_rows`, panel by panel; by a kernel, in float32 whatever the table is."""
    if fused(table_ND):
        rows, k = indices_BK.shape
        starts = torch.arange(0, rows * k + 1, k, device=indices_BK.device)
        return Panels((_triton_ops().weighted_sums(table_ND, indices_BK.flatten(), weights_BK.flatten(), starts),))
    return Panels(tuple(weighted_rows(part.contiguous(), indices_BK, weights_BK) for part in cut(table_ND)))


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
        keys = indices_BK.reshape(-1).to(torch.int16 if dict_size < 1 << 15 else torch.int32)
        latents, order = torch.sort(keys, stable=True)
        offsets = torch.searchsorted(latents, torch.arange(dict_size + 1, device=keys.device, dtype=keys.dtype))
        return cls(order, latents, order // indices_BK.shape[1], offsets, (indices_BK.shape[0], indices_BK.shape[1]))

    def sort(self, values_BK: Tensor) -> Tensor:
        """Values of the pairs in sorted order -> [P]."""
        return values_BK.reshape(-1)[self.order]

    def unsort(self, values_P: Tensor) -> Tensor:
        """The inverse of `sort` -> [B, K]."""
        return torch.empty_like(values_P).scatter_(0, self.order, values_P).view(self.shape)

    def products(self, table_ND: Tensor, x: Panels | Tensor) -> Tensor:
        """`table[latent] . x[row]` of each pair, sorted -> [P]: these entries of `table @ x.T` and no others."""
        x = Panels.of(x)
        if fused(table_ND):
            fused_P: Tensor = _triton_ops().products(table_ND, x[:], self.latents, self.rows)
            return fused_P
        sampled_P = table_ND.new_zeros(len(self.rows))
        shape = (len(table_ND), len(x))
        for table_NC, x_BC in zip(cut(table_ND), x.parts, strict=True):
            places = torch.sparse_csr_tensor(self.offsets, self.rows, sampled_P, shape, check_invariants=False)
            sampled_P = torch.sparse.sampled_addmm(places, table_NC, x_BC.T).values()
        return sampled_P

    def totals(self, values_P: Tensor) -> Tensor:
        """Sum of each latent's (sorted) values -> [N]."""
        return torch.segment_reduce(values_P, "sum", offsets=self.offsets, initial=0, unsafe=True)

    def latent_rows(self, x: Panels | Tensor, weights_P: Tensor, start: int, stop: int) -> Tensor:
        """For latents start..stop the sum of `weight * x[row]` over their pairs -> [stop - start, D], `weights`' dtype.

        With `weights` (sorted) the latents' values, and x the loss's gradient, these are gradient rows of the decoder.
        """
        x, rows_P, offsets = Panels.of(x), self.rows, self.offsets
        if stop - start < len(offsets) - 1:  # some of them: reads two offsets on the host, so CPU only
            low, high = offsets[[start, stop]].tolist()
            rows_P, weights_P, offsets = rows_P[low:high], weights_P[low:high], offsets[start : stop + 1] - low
        if fused(weights_P):
            fused_RD: Tensor = _triton_ops().weighted_sums(x[:], rows_P, weights_P, offsets)
            return fused_RD
        width = sum(part.shape[1] for part in x.parts)
        sums_RD = weights_P.new_empty(stop - start, width)
        for sums_RC, x_BC in zip(cut(sums_RD), x.parts, strict=True):
            weights = weights_P.to(x_BC.dtype)
            bags = F.embedding_bag(
                rows_P, x_BC, offsets, per_sample_weights=weights, mode="sum", include_last_offset=True
            )
            sums_RC.copy_(bags)
        return sums_RD


def _triton_ops() -> ModuleType:
    """The kernels; imported late because Triton compiles for whatever device is there when it is imported."""
    from qwenscope.sae import triton_ops

    return triton_ops
