"""Two figures that are lowest near the right L0 (Chanin and Garriga-Alonso 2025, arXiv 2508.16560): how alike decoder
directions are (equation 4 there, `c_dec`), and how far rows reach along them (equation 59, `s_n_dec`).

Both notice latents into which several correlated features were mixed. Definitions stand in docs/evaluation.md.

Legend: B rows (tokens), D hidden, N latents.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwenscope.evaluation.pairs import unit_decoder
from qwenscope.sae.sae import SAE

BLOCK = 2048  # decoder directions compared with as many others at once
PLACES = {"half": 2, "quarter": 4}  # n is the dictionary size over this
_SHIFT = 12  # bits of a float32 that are not told apart: 20 are left, 11 of them below the exponent
_PROJECTIONS = 1 << 22  # projections held at once, 17 MB


@torch.no_grad()
def decoder_pairwise_cosine(sae: SAE) -> float | None:
    """Mean absolute cosine over all pairs of decoder directions, dead latents' too; None of a single latent.

    Products are float32, block by block, where the SAE is; their sum is float64.
    """
    unit_ND = unit_decoder(sae)
    total = torch.zeros((), dtype=torch.float64, device=unit_ND.device)
    blocks = torch.split(unit_ND, BLOCK)
    for place, first_BD in enumerate(blocks):
        total += (first_BD @ first_BD.T).abs_().triu_(1).sum(dtype=torch.float64)
        for second_BD in blocks[place + 1 :]:
            total += (first_BD @ second_BD.T).abs_().sum(dtype=torch.float64)
    latents = len(unit_ND)
    return float(total) / (latents * (latents - 1) / 2) if latents > 1 else None


class DecoderProjections:
    """Projections of rows on every decoder direction, counted as they pass.

    All rows and latents count. What is kept is a histogram over the first 20 bits of each projection in float32, in
    order of size: its bins are 2^-11 of a value wide, wherever the values lie, so that a place in it is the projection
    there to 2^-12 of itself. Memory does not grow with rows, and counts do not depend on how rows are cut.

    Args:
        sae: of any activation. A transcoder writes elsewhere than it reads, so that it has no such projections.
    """

    def __init__(self, sae: SAE) -> None:
        self.decoder_DN, self.bias_D = sae.decoder.weight.detach(), sae.pre_bias.detach()
        self.norm_N = self.decoder_DN.norm(dim=0).clamp_(min=1e-12)
        self.rows = 0
        self.counts = torch.zeros(1 << (32 - _SHIFT), dtype=torch.int64, device=self.bias_D.device)

    @torch.no_grad()
    def update(self, x_BD: Tensor) -> None:
        """Add rows [B, D] of any floating dtype."""
        for part_BD in torch.split(x_BD, max(1, _PROJECTIONS // len(self.norm_N))):
            z_BN = ((part_BD.to(self.bias_D) - self.bias_D) @ self.decoder_DN).div_(self.norm_N)
            places = _bins(z_BN.flatten()).long()
            self.counts.scatter_add_(0, places, places.new_ones(()).expand_as(places))  # bincount would ask a GPU
            self.rows += len(part_BD)

    def nth(self, n: int) -> float:
        """The projection before which n times the number of rows are larger, in the rows' own units."""
        return _middle(int(torch.searchsorted(self.counts.flip(0).cumsum(0), n * self.rows, right=True)))

    def figures(self, spread: float | None) -> Mapping[str, float] | None:
        """{"half": with n = N / 2, "quarter": with n = N / 4}, in units of `spread`, the root of the rows' mean squared
        deviation per element; None where rows do not vary."""
        if not spread:
            return None
        return {name: self.nth(len(self.norm_N) // part) / spread for name, part in PLACES.items()}


def _bins(values: Tensor) -> Tensor:
    """Bins of float32 values, int32: the order of bins is the order of values."""
    bits = values.view(torch.int32)
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)  # among negative numbers larger bits are smaller
    return ordered.bitwise_right_shift_(_SHIFT).add_(1 << (31 - _SHIFT))


def _middle(from_the_top: int) -> float:
    """The value in the middle of a bin, counted from the largest values' bin."""
    number = (1 << (32 - _SHIFT)) - 1 - from_the_top - (1 << (31 - _SHIFT))
    ordered = torch.tensor((number << _SHIFT) + (1 << (_SHIFT - 1)), dtype=torch.int32)
    return float((ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32))
