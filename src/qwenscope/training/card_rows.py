"""A batch's rows on a GPU, as kernels make and read them.

Legend: B rows (tokens), D hidden, N latents, K active latents per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qwenscope.sae import ops
from qwenscope.sae.selection import Selection


@dataclass(frozen=True, slots=True)
class CardRows(ops.Panels):
    """Centred rows (x - offset) / rms: one panel in the dtype that products and gathers take, and what float32 says of
    them. Errors are of the float32 rows, which are made where they are needed and not kept.

    x: [B, D], of any dtype. offset: [D]. rms: 0-dim. squares_2B: of each row's difference from the rows' mean, and of
    the row.
    """

    x: Tensor
    offset: Tensor
    rms: Tensor
    squares_2B: Tensor

    @classmethod
    def made(cls, x_BD: Tensor, offset_D: Tensor, rms: Tensor, dtype: torch.dtype) -> Self:
        """By a kernel, in `dtype`."""
        from qwenscope.training import triton_step

        rows_BD, squares_2B = triton_step.centre(x_BD, offset_D, rms, dtype)
        return cls((rows_BD,), x_BD, offset_D, rms, squares_2B)

    def squares(self) -> Tensor:
        """As `Panels.squares`, of the float32 rows."""
        return self.squares_2B[1]

    def spread(self) -> tuple[Tensor, Tensor]:
        """As `Panels.spread`, of the float32 rows."""
        deviation, square = self.squares_2B.sum(1)
        return deviation, square

    def errors(self, decoder_ND: Tensor, selection: Selection) -> tuple[ops.Panels, Tensor]:
        """As `Weights.errors`; the errors in the decoder's dtype."""
        from qwenscope.training import triton_step

        errors_BD, squares_B = triton_step.errors(
            self.x, self.offset, self.rms, decoder_ND, selection.indices, selection.values
        )
        return ops.Panels((errors_BD,)), squares_B
