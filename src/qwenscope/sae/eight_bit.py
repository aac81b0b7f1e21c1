"""Approximate pre-activations from products of 8-bit integers, in half of a bfloat16 product's time or less.

Each row of both matrices is divided by its largest magnitude / 127 and rounded (vector-wise symmetric quantisation,
Dettmers et al. 2022, section 3.1). A residual stream has a few columns far larger than the others, which would leave
little of the 8 bits to the rest: as in section 3.2 of that paper they are multiplied apart, in float32. What is left
is an error of about 1 % of the scores' spread: candidates, whose float32 values decide (see `selection`).

Legend: B rows, R rows of a slice, D hidden, N latents, A columns multiplied apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qwenscope.sae.ops import Panels

CHUNK_ROWS = 512
"""Rows per product; fewer would read the encoder more often than its products pay for."""
SLICE_ROWS = 16
"""Rows of a chunk whose integers become scores at a time: these stay in cache."""
COLUMNS_APART = 32
_QUANTISED_ROWS = 64


def quantise(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """-> (int8 [R, D], float32 scale of each row [R, 1]); a row of zeros has scale 1."""
    scale_R1 = torch.maximum(x_RD.amax(1, keepdim=True), -x_RD.amin(1, keepdim=True)) / 127
    scale_R1.masked_fill_(scale_R1 == 0, 1.0)
    return (x_RD / scale_R1).round_().to(torch.int8), scale_R1


def columns_apart(x: Panels) -> Tensor:
    """Columns, at most COLUMNS_APART, whose largest magnitude is above twice the median column's -> int64 [A]."""
    largest_D = torch.cat([part.abs().amax(0) for part in x.parts])
    values, columns = largest_D.topk(min(COLUMNS_APART, len(largest_D)))
    return columns[values > 2 * largest_D.median()]


class EightBit:
    """An encoder [N, D] as 8-bit integers, each latent's row with a scale of its own."""

    def __init__(self, weight_ND: Tensor) -> None:
        self.values_ND = torch.empty_like(weight_ND, dtype=torch.int8)
        self.scale_N = weight_ND.new_empty(len(weight_ND))
        self._integers = torch.empty(CHUNK_ROWS, len(weight_ND), dtype=torch.int32)
        self._scores = torch.empty(SLICE_ROWS, len(weight_ND), dtype=torch.float32)
        self[slice(0, len(weight_ND))] = weight_ND

    def __setitem__(self, latents: slice | Tensor, weight_LD: Tensor) -> None:
        """Quantise these rows of the encoder."""
        values_LD, scale_L = self.values_ND[latents], self.scale_N[latents]
        for start in range(0, len(weight_LD), _QUANTISED_ROWS):
            some = slice(start, start + _QUANTISED_ROWS)
            values, scale = quantise(weight_LD[some])
            values_LD[some] = values
            scale_L[some] = scale.squeeze(1)
        if isinstance(latents, Tensor):  # then the above are copies
            self.values_ND[latents], self.scale_N[latents] = values_LD, scale_L

    def scores(self, rows: Panels, weight_ND: Tensor, bias_N: Tensor) -> Iterator[Tensor]:
        """About `rows @ weight.T + bias`, SLICE_ROWS rows at a time -> [R, N]; each overwrites the one before."""
        apart_A = columns_apart(rows)
        weight_AN = weight_ND[:, apart_A].T.contiguous()
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk_RD = rows[start : start + CHUNK_ROWS]
            values_RD, scale_R1 = quantise(chunk_RD.index_fill(1, apart_A, 0.0))
            integers_RN = torch._int_mm(values_RD, self.values_ND.T, out=self._integers[: len(chunk_RD)])
            slices = (torch.split(part, SLICE_ROWS) for part in (integers_RN, scale_R1, chunk_RD[:, apart_A]))
            for integers, scale, apart in zip(*slices, strict=True):
                scores = torch.mul(integers, self.scale_N, out=self._scores[: len(scale)])
                torch.addcmul(bias_N, scores, scale, out=scores)
                yield scores.addmm_(apart, weight_AN) if len(apart_A) else scores
