"""The gradient of the training loss, kept as pairs: rows of it are computed when they are needed, and only then.

With g = dLoss/dx_hat, delta = dLoss/dz (z a pre-activation) and pairs p = (b, n) of a row and an active latent:

    decoder row n   sum of a_p g_b            delta_p = g_b . decoder_n, where a_p > 0
    encoder row n   sum of delta_p x_b        encoder bias n: sum of delta_p
    pre_bias        sum_b g_b - sum_n bias_n encoder_n

Legend: B rows (tokens), D hidden, N latents, K active latents, P = B * K pairs, M dead latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwenscope.sae import ops
from qwenscope.sae.selection import Selection
from qwenscope.training.nested import Nested
from qwenscope.training.weights import Weights

if TYPE_CHECKING:
    from qwenscope.training.triton_step import GradientRows


DOWNSTREAM_SIZE = 0.3
"""Of what a `Downstream` adds to the loss, beside the error. At 1, as Karvonen (2025) has it, the error rose by 5
to 9 % on the stand-in; at 0.3 by 3 %, for about as much less KL at two of three hook points (docs/experiments.md)."""
Downstream = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps a batch's reconstructions [B, D], in the rows' own units, to what they cost further on, a loss (0-dim), and its
gradient [B, D]."""


def variance(x: ops.Panels) -> Tensor:
    """Sum of squared deviations from the batch mean; at least 1e-6 of the sum of squares, since less is rounding.

    A single row is its own mean: what it deviates from is then the pre_bias that has been subtracted from it.
    """
    if len(x) == 1:
        square = x.squares().sum()
        return square.clamp_min(torch.finfo(square.dtype).tiny)
    deviation, square = x.spread()
    return torch.maximum(deviation, 1e-6 * square).clamp_min(torch.finfo(deviation.dtype).tiny)


@dataclass(frozen=True, slots=True)
class Auxiliary:
    """Loss and gradient of the dead-latent loss; its matrices are dense, but only over the dead.

    loss: 0-dim. latents: [M] int64, ascending. encoder_MD, decoder_MD, bias_M: gradients, the coefficient included.
    """

    loss: Tensor
    latents: Tensor
    encoder_MD: Tensor
    decoder_MD: Tensor
    bias_M: Tensor

    @classmethod
    def of(
        cls,
        weights: Weights,
        rows: ops.Panels,
        error: ops.Panels,
        pre_BM: Tensor,
        kept_BM: Tensor,
        latents: Tensor,
        scale: float,
    ) -> Auxiliary:
        """Reconstruct what is left, e = x - x_hat = -error, from the kept dead pre-activations, without ReLU.

        With codes c (the kept pre-activations, else 0), W and V the dead rows of encoder and decoder, e held fixed:

            e_hat = c V                         loss = ||e - e_hat||^2 / whole,  whole = ||e - mean(e)||^2
            g = dLoss/de_hat = 2 (e_hat - e) / whole
            dV = c^T g                          delta = g V^T where kept;  dW = delta^T x,  dbias = sum_b delta

        The products run in `pre_BM`'s dtype; where that is bfloat16, the gradient (weighted by `scale`) carries its
        rounding.
        """
        dtype, full = pre_BM.dtype, weights["pre_bias"].dtype
        error = error.to(full)
        left_BM = ~kept_BM
        codes_BM = pre_BM.masked_fill(left_BM, 0.0)
        decoder_MD = weights["decoder"][latents].to(dtype)
        g_BD, whole = weights.decode_dense(codes_BM, decoder_MD), variance(error)
        losses = []
        for e_hat, minus_e in zip(ops.cut(g_BD), error.parts, strict=True):  # g_BD begins as e_hat
            off = minus_e + e_hat
            losses.append(torch.linalg.vector_norm(off).square())
            e_hat.copy_(off.mul_(2 * scale / whole))
        delta_BM = (g_BD @ decoder_MD.T).masked_fill_(left_BM, 0.0)
        return cls(
            torch.stack(losses).sum() / whole,
            latents,
            (delta_BM.T @ rows.to(dtype)[:]).to(full),
            (codes_BM.T @ g_BD).to(full),
            delta_BM.sum(0, dtype=full),
        )


@dataclass(frozen=True, slots=True)
class SparseGradient:
    """Gradient of one batch's loss for all parameters, before the decoder's projection.

    x, g: centred rows [B, D] and dLoss/dx_hat [B, D] (of nested prefixes [S, D], see `nested`), in the dtype that row
    gradients gather. pairs, towards: with rows of x and of g. encoder_bias [N], pre_bias [D]: complete.
    fired: bool [N]. bound: 0-dim, at least the gradient's norm.
    """

    x: ops.Panels
    g: ops.Panels
    pairs: ops.Pairs
    towards: ops.Pairs
    values_P: Tensor
    delta_P: Tensor
    encoder_bias: Tensor
    pre_bias: Tensor
    fired: Tensor
    bound: Tensor
    auxiliary: Auxiliary | None

    @classmethod
    def of(
        cls,
        weights: Weights,
        rows: ops.Panels,
        g: ops.Panels,
        g_norm_S: Tensor,
        selection: Selection,
        auxiliary: Auxiliary | None,
        nested: Nested,
    ) -> SparseGradient:
        """Products of the active pairs, and everything that is small; `g_norm_S`: of the rows of `g`."""
        table, of_bias = weights.decoder, weights["pre_bias"].dtype
        pairs = ops.Pairs.of(selection.indices, weights.latents)
        towards = nested.towards(pairs)
        x_gathered, g_gathered = rows.to(table.dtype), g.to(table.dtype)
        values_P = pairs.sort(selection.values)
        if ops.fused(table):
            delta_P = towards.products(table, g_gathered)
            encoder_bias, fired, bounds = _totals_by_kernel(pairs, towards, values_P, delta_P, rows.squares(), g_norm_S)
        else:
            active_P = values_P > 0
            # A CPU has no sampled product in bfloat16.
            delta_P = towards.products(weights["decoder"], g).to(values_P.dtype) * active_P
            encoder_bias = pairs.totals(delta_P)
            fired = pairs.totals(active_P.to(values_P.dtype)) > 0
            # Triangle inequality, latent by latent: ||sum_p a_p g_b|| <= sum_p a_p ||g_b||, likewise for the encoder.
            # Usually that is far below the clipping norm, and then no norm is needed before the update.
            decoder_N = pairs.totals(values_P * g_norm_S[towards.rows])
            encoder_N = pairs.totals(delta_P.abs() * rows.squares().sqrt()[pairs.rows])
            bounds = [decoder_N, encoder_N, encoder_bias]
        if auxiliary is not None:
            latents = auxiliary.latents
            encoder_bias.index_copy_(0, latents, encoder_bias[latents] + auxiliary.bias_M)
        summed_D = ops.joined([part[:: len(nested)].sum(0, dtype=of_bias) for part in g.parts])
        pre_bias = summed_D - weights.through_encoder(encoder_bias)
        bound = torch.stack([part.norm() for part in (*bounds, pre_bias)]).norm()
        if auxiliary is not None:
            bound = bound + (auxiliary.encoder_MD.norm() + auxiliary.decoder_MD.norm())
        return cls(
            x_gathered,
            g_gathered,
            pairs,
            towards,
            values_P,
            delta_P,
            encoder_bias,
            pre_bias,
            fired,
            weights.bound(bound),
            auxiliary,
        )

    def unmade(self, name: str) -> GradientRows:
        """All rows of the "encoder" or "decoder" gradient, for kernels that make them where they are needed."""
        from qwenscope.training import triton_step

        extra = None
        if (dead := self.auxiliary) is not None:
            slots_N = torch.full_like(self.fired, -1, dtype=torch.int32)
            slots_N[dead.latents] = torch.arange(len(dead.latents), dtype=torch.int32, device=slots_N.device)
            extra = (dead.encoder_MD if name == "encoder" else dead.decoder_MD), slots_N
        if name == "encoder":
            return triton_step.GradientRows(self.x[:], self.pairs, self.delta_P, extra)
        return triton_step.GradientRows(self.g[:], self.towards, self.values_P, extra)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of the "encoder" or "decoder" gradient -> [stop - start, D]."""
        if name == "encoder":
            rows = self.pairs.latent_rows(self.x, self.delta_P, start, stop)
        else:
            rows = self.towards.latent_rows(self.g, self.values_P, start, stop)
        if self.auxiliary is not None:
            latents = self.auxiliary.latents
            extra_MD = self.auxiliary.encoder_MD if name == "encoder" else self.auxiliary.decoder_MD
            if stop - start < len(self.fired):  # some rows: reads two bounds on the host, so CPU only
                low, high = torch.searchsorted(latents, torch.tensor([start, stop])).tolist()
                latents, extra_MD = latents[low:high] - start, extra_MD[low:high]
            rows.index_copy_(0, latents, rows.index_select(0, latents) + extra_MD)
        return rows


def _totals_by_kernel(
    pairs: ops.Pairs, towards: ops.Pairs, values_P: Tensor, delta_P: Tensor, x_squares_B: Tensor, g_norm_S: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradient of the encoder's bias [N], which latents fired [N], and what bounds the norm; `delta_P` as it should be
    where nothing is active.
    """
    from qwenscope.training import triton_step

    totals_3N, fired_N = triton_step.pair_totals(pairs, towards, values_P, delta_P, x_squares_B, g_norm_S)
    return totals_3N[0], fired_N, [totals_3N]
