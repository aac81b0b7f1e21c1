"""The gradient of the training loss, kept as pairs: rows of it are computed when they are needed, and only then.

With g = dLoss/dx_hat, delta = dLoss/dz (z a pre-activation) and pairs p = (b, n) of a row and an active latent:

    decoder row n   sum of a_p g_b            delta_p = g_b . decoder_n, where a_p > 0
    encoder row n   sum of delta_p x_b        encoder bias n: sum of delta_p
    pre_bias        sum_b g_b - sum_n bias_n encoder_n

Legend: B rows (tokens), D hidden, N latents, K active latents, P = B * K pairs, M dead latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwenscope.sae import ops
from qwenscope.sae.selection import Selection
from qwenscope.training.nested import Nested
from qwenscope.training.weights import Weights


def variance(x: ops.Panels) -> Tensor:
    """Sum of squared deviations from the batch mean; at least 1e-6 of the sum of squares, since less is rounding.

    A single row is its own mean: what it deviates from is then the pre_bias that has been subtracted from it.
    """
    if len(x) == 1:
        return x.squares().sum().clamp_min(torch.finfo(x.parts[0].dtype).tiny)
    deviation = torch.stack([(part - part.mean(0)).square_().sum() for part in x.parts]).sum()
    return torch.maximum(deviation, 1e-6 * x.squares().sum()).clamp_min(torch.finfo(deviation.dtype).tiny)


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
        dtype, full = pre_BM.dtype, error.parts[0].dtype
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
        selection: Selection,
        auxiliary: Auxiliary | None,
        nested: Nested,
    ) -> SparseGradient:
        """Products of the active pairs, and everything that is small."""
        n, k, table = weights.latents, selection.values.shape[1], weights.decoder
        on_gpu = table.is_cuda
        pairs = (ops.DensePairs if weights.dense(k) else ops.Pairs).of(selection.indices, n)
        towards = nested.towards(pairs)
        x_gathered, g_gathered = rows.to(table.dtype), g.to(table.dtype)
        values_P = pairs.sort(selection.values)
        active_P = values_P > 0
        # A CPU has no sampled product in bfloat16.
        products_P = towards.products(table, g_gathered) if on_gpu else towards.products(weights["decoder"], g)
        delta_P = products_P.to(values_P.dtype) * active_P
        encoder_bias = pairs.totals(delta_P)
        # Triangle inequality, latent by latent: ||sum_p a_p g_b|| <= sum_p a_p ||g_b||, and likewise for the encoder.
        # Usually that is far below the clipping norm, and then no norm is needed before the update.
        g_norm_S, x_norm_B = g.squares().sqrt(), rows.squares().sqrt()
        decoder_N = pairs.totals(values_P * g_norm_S[towards.rows])
        encoder_N = pairs.totals(delta_P.abs() * x_norm_B[pairs.rows])
        extra = []
        if auxiliary is not None:
            latents = auxiliary.latents
            encoder_bias.index_copy_(0, latents, encoder_bias[latents] + auxiliary.bias_M)
            extra = [auxiliary.encoder_MD.norm(), auxiliary.decoder_MD.norm()]
        pre_bias = torch.cat([part[:: len(nested)].sum(0) for part in g.parts]) - weights.through_encoder(encoder_bias)
        sparse = torch.stack([part.norm() for part in (decoder_N, encoder_N, encoder_bias, pre_bias)]).norm()
        return cls(
            x_gathered,
            g_gathered,
            pairs,
            towards,
            values_P,
            delta_P,
            encoder_bias,
            pre_bias,
            pairs.totals(active_P.to(values_P.dtype)) > 0,
            weights.bound(sparse + sum(extra)),
            auxiliary,
        )

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
