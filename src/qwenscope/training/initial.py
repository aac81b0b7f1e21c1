"""What is fitted of an SAE before its first step: where latents point, and how long the encoder is.

In many dimensions no random direction is near a row, and a short run spends most of its steps on finding some; rows,
less their mean, are near other rows from the first step on.

Legend: R rows, B some of them, D hidden, N latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from qwenscope.training.active import ActiveLatents
from qwenscope.training.weights import Weights

InitialDecoder = Literal["random", "rows"]


def point_at_rows(weights: Weights, rows_RD: Tensor, mean_D: Tensor, generator: torch.Generator) -> None:
    """Turn the decoder's rows into the directions of `rows_RD` from their mean, each taken once, in a random order.

    Latents beyond the number of rows stay as they are, and so do those that draw a row without a direction. An SAE that
    is spread over ranks gets the rows that it would get in one piece.
    """
    latents = slice(weights.first, weights.first + weights.latents)
    drawn = torch.randperm(len(rows_RD), generator=generator)[latents].to(rows_RD.device)
    x_ND = rows_RD[drawn].to(mean_D) - mean_D
    length_N = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True)
    decoder_ND = weights["decoder"][: len(drawn)]
    decoder_ND.copy_(torch.where(length_N > 0, x_ND / length_N, decoder_ND))
    weights.refresh("decoder")


def tie_encoder(weights: Weights, active: ActiveLatents, rows: Iterable[Tensor]) -> None:
    """Make the encoder c times the decoder, c by least squares of the reconstruction of `rows`, parts x_BD.

    Codes are homogeneous in c, so that with x_hat the reconstruction where W_enc = W_dec

        c = sum <x, x_hat> / sum ||x_hat||^2

    and 1 where no latent is active.
    """
    decoder_ND = weights["decoder"]
    target = fitted = decoder_ND.new_zeros(())
    for x_BD in rows:
        found = active.of(x_BD @ decoder_ND.T)
        x_hat_BD = weights.decode_exactly(found.indices, found.values)
        target = target + (x_BD * x_hat_BD).sum()
        fitted = fitted + x_hat_BD.square().sum()
    weights["encoder"].copy_(decoder_ND * torch.where(fitted > 0, target / fitted, 1.0))
    weights.refresh("encoder")
