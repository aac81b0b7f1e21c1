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
    the row. by_product: whether the sum of decoder rows is made by one product of all latents.
    """

    x: Tensor
    offset: Tensor
    rms: Tensor
    squares_2B: Tensor
    by_product: bool

    @classmethod
    def made(cls, x_BD: Tensor, offset_D: Tensor, rms: Tensor, decoder_ND: Tensor, k: int) -> Self:
        """By a kernel, in the decoder's dtype; `k`: active latents per row."""
        from qwenscope.training import triton_step

        rows_BD, squares_2B = triton_step.centre(x_BD, offset_D, rms, decoder_ND.dtype)
        by_product = decoder_ND.dtype == torch.bfloat16 and ops.product_pays(len(decoder_ND), decoder_ND.shape[1], k)
        return cls((rows_BD,), x_BD, offset_D, rms, squares_2B, by_product)

    def squares(self) -> Tensor:
        """As `Panels.squares`, of the float32 rows."""
        return self.squares_2B[1]

    def spread(self) -> tuple[Tensor, Tensor]:
        """As `Panels.spread`, of the float32 rows."""
        deviation, square = self.squares_2B.sum(1)
        return deviation, square

    def errors(self, decoder_ND: Tensor, selection: Selection) -> tuple[ops.Panels, Tensor]:
        """As `Weights.errors`; the errors in the decoder's dtype. Values of a bfloat16 decoder's SAE are of bfloat16,
        too, so that a product of them loses nothing.
        """
        from qwenscope.training import triton_step

        indices, values, x_hat_BD = selection.indices, selection.values, None
        if self.by_product:
            x_hat_BD = ops.product(triton_step.codes(indices, values, len(decoder_ND)), decoder_ND)
        errors_BD, squares_B = triton_step.errors(self.x, self.offset, self.rms, decoder_ND, indices, values, x_hat_BD)
        return ops.Panels((errors_BD,)), squares_B
