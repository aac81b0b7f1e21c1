"""What is fitted of an SAE before its first step: where latents point, and how long the encoder is.

In many dimensions no random direction is near a row, and a short run spends most of its steps on finding some; rows,
less their mean, are near other rows from the first step on. What others' directions leave of them is nearer still to a
single feature, and no two latents begin at what rows have in common.

Legend: R rows, B some of them, D hidden, N latents, S directions that explain a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from qwenscope.training.active import ActiveLatents
from qwenscope.training.weights import Weights

InitialDecoder = Literal["random", "rows", "residuals"]

_PART = 256
"""Latents that point at what the same earlier ones leave."""
_SUPPORT = 4
"""S."""
_RIDGE, _NOTHING = 1e-3, 1e-2
"""Of unit directions' squares, so that equal ones can be fitted; share of a row's length below which none is left."""


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


def point_at_residuals(weights: Weights, rows_RD: Tensor, mean_D: Tensor, generator: torch.Generator) -> None:
    """Turn the decoder's rows into the directions of what earlier ones leave of `rows_RD` less their mean.

    The first part of the latents points at rows as they are, each further part at what is left of other rows, each
    taken once in a random order, after the S directions so far that reach farthest along a row were taken away, by
    least squares without negative weights: matching pursuit on a dictionary that grows. Latents stay as they are where
    `point_at_rows` would leave them and where nothing is left of a row. Every rank finds the directions of all latents
    up to its own last one, [N, D] in the weights' dtype.
    """
    last = weights.first + weights.latents
    drawn = torch.randperm(len(rows_RD), generator=generator)[:last].to(rows_RD.device)
    found_ND = mean_D.new_zeros(len(drawn), len(mean_D))
    for begin in range(0, len(drawn), _PART):
        x_BD = rows_RD[drawn[begin : begin + _PART]].to(mean_D) - mean_D
        left_BD = _unexplained(x_BD, found_ND[:begin]) if begin else x_BD
        length_B, whole_B = (torch.linalg.vector_norm(y_BD, dim=1, keepdim=True) for y_BD in (left_BD, x_BD))
        found_ND[begin : begin + _PART] = torch.where(length_B > _NOTHING * whole_B, left_BD / length_B, 0.0)
    own_ND = found_ND[weights.first :]
    decoder_ND = weights["decoder"][: len(own_ND)]
    decoder_ND.copy_(torch.where(own_ND.any(dim=1, keepdim=True), own_ND, decoder_ND))
    weights.refresh("decoder")


def _unexplained(x_BD: Tensor, directions_ND: Tensor) -> Tensor:
    """What S of the unit directions leave of each row."""
    best_BS = (x_BD @ directions_ND.T).topk(_SUPPORT, dim=1).indices
    chosen_BSD = directions_ND[best_BS]
    gram_BSS = chosen_BSD @ chosen_BSD.mT + _RIDGE * torch.eye(_SUPPORT, dtype=x_BD.dtype, device=x_BD.device)
    along_BS1 = chosen_BSD @ x_BD.unsqueeze(-1)
    weights_BS1: Tensor = torch.linalg.solve_ex(gram_BSS, along_BS1).result.clamp_min(0)
    return x_BD - (weights_BS1.mT @ chosen_BSD).squeeze(1)


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
