"""The trained tensors: float32 masters, Adam's moments, and bfloat16 shadows for the products.

Legend: D hidden, N latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenscope.sae.selection import Precision
from qwenscope.sae.topk import TopKSAE

PARAMETERS = ("encoder", "encoder_bias", "decoder", "pre_bias")


class Weights:
    """Parameters of one SAE in training order, each with its moments.

    parameters: "encoder" [N, D], "encoder_bias" [N], "decoder" [N, D] (unit rows), "pre_bias" [D]. means, squares:
    Adam's first and second moments under the same names. shadows: bfloat16 copies of those matrices that the precision
    multiplies in bfloat16; the caller refreshes them with `refresh` after each change.
    """

    def __init__(self, sae: TopKSAE, precision: Precision, moments: torch.dtype) -> None:
        dtype = torch.float64 if sae.pre_bias.dtype == torch.float64 else torch.float32
        self.parameters: dict[str, Tensor] = {
            "encoder": sae.encoder.weight.detach().to(dtype, copy=True).contiguous(),
            "encoder_bias": sae.encoder.bias.detach().to(dtype, copy=True),
            "decoder": sae.decoder.weight.detach().T.to(dtype, copy=True).contiguous(),
            "pre_bias": sae.pre_bias.detach().to(dtype, copy=True),
        }
        self.means = {name: torch.zeros_like(value, dtype=moments) for name, value in self.parameters.items()}
        self.squares = {name: torch.zeros_like(value, dtype=moments) for name, value in self.parameters.items()}
        self.shadow(precision)

    def shadow(self, precision: Precision) -> None:
        """Make the shadows that `precision` needs, from the parameters."""
        shadowed = {"fp32": (), "exact": ("encoder",), "bf16": ("encoder", "decoder")}[precision]
        self.shadows = {name: self.parameters[name].bfloat16() for name in shadowed}

    def __getitem__(self, name: str) -> Tensor:
        return self.parameters[name]

    @property
    def dict_size(self) -> int:
        """N, number of latents."""
        return len(self.parameters["encoder"])

    def table(self, name: str) -> Tensor:
        """The matrix as the precision multiplies it: the shadow where there is one."""
        return self.shadows.get(name, self.parameters[name])

    def refresh(self, name: str, rows: slice | Tensor = slice(None)) -> None:
        """Bring the shadow of `rows` up to date, if the matrix has one."""
        if name in self.shadows:
            self.shadows[name][rows] = self.parameters[name][rows].bfloat16()

    def restart(self, latents: Tensor, directions_LD: Tensor, encoder_norm: Tensor) -> None:
        """Point the given latents [L] at unit `directions`, with a weak encoder, no bias and moments of zero."""
        self.parameters["decoder"][latents] = directions_LD
        self.parameters["encoder"][latents] = directions_LD * encoder_norm
        self.parameters["encoder_bias"][latents] = 0.0
        for name in ("encoder", "encoder_bias", "decoder"):
            self.means[name][latents] = 0.0
            self.squares[name][latents] = 0.0
            self.refresh(name, latents)
