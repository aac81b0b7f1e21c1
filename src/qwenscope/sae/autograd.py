"""Differentiable encode and decode whose backward passes touch only the active latents.

For fine-tuning an SAE end to end through `SAE.forward`; `SAETrainer` needs no autograd. The weights' gradients are
dense tensors, as optimisers expect, but they are summed pair by pair. Second derivatives are refused by torch's own
error.

Legend: B rows (tokens), D hidden, N latents, K active latents per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwenscope.sae import ops

Select = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pre-activations [B, N] -> the active ones' (values [B, K] of at least 0, indices [B, K])."""


class _SparseEncode(torch.autograd.Function):
    """(rows [B, D], weight [N, D], bias [N], select) -> (values [B, K] of at least 0, indices [B, K])."""

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor, weight_ND: Tensor, bias_N: Tensor, select: Select) -> tuple[Tensor, Tensor]:
        values_BK, indices_BK = select(torch.addmm(bias_N, rows_BD, weight_ND.T))
        ctx.save_for_backward(rows_BD, weight_ND, values_BK, indices_BK)
        ctx.mark_non_differentiable(indices_BK)
        return values_BK, indices_BK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_BD, weight_ND, values_BK, indices_BK = ctx.saved_tensors
        delta_BK = grads[0] * (values_BK > 0)
        pairs = ops.Pairs.of(indices_BK, len(weight_ND))
        delta_P = pairs.sort(delta_BK)
        weight = pairs.latent_rows(rows_BD, delta_P, 0, len(weight_ND)) if ctx.needs_input_grad[1] else None
        rows = ops.weighted_rows(weight_ND, indices_BK, delta_BK) if ctx.needs_input_grad[0] else None
        return rows, weight, pairs.totals(delta_P), None


class _SparseDecode(torch.autograd.Function):
    """(values [B, K], indices [B, K], table [N, D]) -> their weighted sum [B, D]."""

    @staticmethod
    def forward(ctx: Any, values_BK: Tensor, indices_BK: Tensor, table_ND: Tensor) -> Tensor:
        ctx.save_for_backward(values_BK, indices_BK, table_ND)
        return ops.weighted_rows(table_ND, indices_BK, values_BK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_BK, indices_BK, table_ND = ctx.saved_tensors
        g = ops.Panels.of(grads[0])
        pairs = ops.Pairs.of(indices_BK, len(table_ND))
        values = pairs.unsort(pairs.products(table_ND, g)) if ctx.needs_input_grad[0] else None
        table = None
        if ctx.needs_input_grad[2]:
            table = pairs.latent_rows(g, pairs.sort(values_BK), 0, len(table_ND))
        return values, None, table


def sparse_encode(rows_BD: Tensor, weight_ND: Tensor, bias_N: Tensor, select: Select) -> tuple[Tensor, Tensor]:
    """Those entries of `rows @ weight.T + bias` that `select` takes -> (values [B, K], indices [B, K])."""
    values_BK, indices_BK = _SparseEncode.apply(rows_BD, weight_ND, bias_N, select)  # type: ignore[no-untyped-call]
    return values_BK, indices_BK


def sparse_decode(values_BK: Tensor, indices_BK: Tensor, table_ND: Tensor) -> Tensor:
    """Sum of `values[b, j] * table[indices[b, j]]` over j -> [B, D]."""
    x_BD: Tensor = _SparseDecode.apply(values_BK, indices_BK, table_ND)  # type: ignore[no-untyped-call]
    return x_BD
