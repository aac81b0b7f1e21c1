"""The trained tensors: masters in float32 or float64, Adam's moments, and shadows of fewer bits for the products.

Legend: B rows (tokens), D hidden, N latents, K active latents, M some of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwenscope.sae import ops
from qwenscope.sae.eight_bit import EightBit
from qwenscope.sae.sae import SAE
from qwenscope.sae.selection import Precision, Selection, eight_bits_pay
from qwenscope.training.card_rows import CardRows

PARAMETERS = ("encoder", "encoder_bias", "decoder", "pre_bias")


def master_dtype(sae: SAE) -> torch.dtype:
    """What an SAE is trained in: float64 if it is of that, else float32."""
    return torch.float64 if sae.pre_bias.dtype == torch.float64 else torch.float32


class Weights:
    """Parameters of one SAE in training order, each with its moments, and the sums over latents that a step needs.

    parameters: "encoder" [N, D], "encoder_bias" [N], "decoder" [N, D] (unit rows), "pre_bias" [D]. means, squares:
    Adam's first and second moments under the same names. shadows: copies in bfloat16 of the matrices that the precision
    multiplies so, or in 8-bit integers; the caller refreshes them with `refresh` after each change.
    """

    def __init__(self, sae: SAE, precision: Precision, moments: torch.dtype | None) -> None:
        dtype = master_dtype(sae)
        self.parameters: dict[str, Tensor] = {
            "encoder": sae.encoder.weight.detach().to(dtype, copy=True).contiguous(),
            "encoder_bias": sae.encoder.bias.detach().to(dtype, copy=True),
            "decoder": sae.decoder.weight.detach().T.to(dtype, copy=True).contiguous(),
            "pre_bias": sae.pre_bias.detach().to(dtype, copy=True),
        }
        self.means = {name: torch.zeros_like(value, dtype=moments) for name, value in self.parameters.items()}
        self.squares = {name: torch.zeros_like(value, dtype=moments) for name, value in self.parameters.items()}
        self.shadow(precision, eight_bits=precision == "exact" and self._eight_bits_pay())

    def _eight_bits_pay(self) -> bool:
        """Whether products of 8-bit integers are the faster candidates here."""
        return eight_bits_pay(self.parameters["encoder"])

    def shadow(self, precision: Precision, eight_bits: bool) -> None:
        """Make the shadows that `precision` needs, from the parameters; `eight_bits`: exact's in place of bfloat16."""
        shadowed = {"fp32": (), "exact": ("encoder",), "bf16": ("encoder", "decoder")}[precision]
        self.shadows: dict[str, Tensor | EightBit] = {}
        for name in shadowed:
            self.shadows[name] = EightBit(self.parameters[name]) if eight_bits else self.parameters[name].bfloat16()

    @property
    def eight_bits(self) -> bool:
        """Whether candidates come from products of 8-bit integers."""
        return isinstance(self.shadows.get("encoder"), EightBit)

    def __getitem__(self, name: str) -> Tensor:
        return self.parameters[name]

    @property
    def latents(self) -> int:
        """N, how many latents these are."""
        return len(self.parameters["encoder"])

    @property
    def first(self) -> int:
        """Which latent of the SAE the first of these is."""
        return 0

    @property
    def encoder(self) -> Tensor | EightBit:
        """The encoder as the precision multiplies it: the shadow where there is one."""
        return self.shadows.get("encoder", self.parameters["encoder"])

    @property
    def decoder(self) -> Tensor:
        """The decoder as the precision gathers it, likewise."""
        decoder = self.shadows.get("decoder", self.parameters["decoder"])
        assert isinstance(decoder, Tensor)
        return decoder

    def decode(self, indices_BK: Tensor, values_BK: Tensor) -> ops.Panels:
        """The sum of the named decoder rows, weighted -> x_hat [B, D], in the parameters' dtype."""
        return ops.decode(self.decoder, indices_BK, values_BK).to(self.parameters["pre_bias"].dtype)

    def errors(self, selection: Selection, rows: ops.Panels) -> tuple[ops.Panels, Tensor]:
        """What the active latents miss of `rows`: x_hat - x [B, D], and each row's square [B]."""
        if isinstance(rows, CardRows):
            return rows.errors(self.decoder, selection)
        errors = self.decode(selection.indices, selection.values).sub_(rows)
        return errors, errors.squares()

    def decode_exactly(self, indices_BK: Tensor, values_BK: Tensor) -> Tensor:
        """As `decode`, from the parameters themselves whatever the precision."""
        return ops.weighted_rows(self.parameters["decoder"], indices_BK, values_BK)

    def decode_dense(self, codes_BM: Tensor, decoder_MD: Tensor) -> Tensor:
        """The same sum over some latents, of which every row has a code -> [B, D]."""
        return codes_BM @ decoder_MD

    def through_encoder(self, bias_N: Tensor) -> Tensor:
        """The sum of encoder rows, weighted by a number of each latent -> [D]; on a GPU from the shadow."""
        encoder = self.encoder
        if isinstance(encoder, Tensor) and encoder.is_cuda and encoder.dtype == torch.bfloat16:
            return ops.product(bias_N.to(encoder.dtype).unsqueeze(0), encoder).squeeze(0)
        return bias_N @ self.parameters["encoder"]

    def bound(self, of_latents: Tensor) -> Tensor:
        """A bound on the whole gradient's norm, from one on the norm of these latents' (and of pre_bias's)."""
        return of_latents

    def norm(self, encoder_bias: Tensor, pre_bias: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """The whole gradient's norm, from the norms of its parts; `rows`: of blocks of both matrices."""
        whole: Tensor = torch.stack([encoder_bias, pre_bias, *rows]).norm()
        return whole

    def refresh(self, name: str, rows: slice | Tensor = slice(None)) -> None:
        """Bring the shadow of `rows` up to date, if the matrix has one."""
        if name in self.shadows:
            shadow, values = self.shadows[name], self.parameters[name][rows]
            shadow[rows] = values if isinstance(shadow, EightBit) else values.to(shadow.dtype)

    def restart(self, latents: Tensor, directions_LD: Tensor, encoder_norm: Tensor) -> None:
        """Point the given latents [L] at unit `directions`, with a weak encoder, no bias and moments of zero."""
        directions_LD = directions_LD.to(encoder_norm)
        self.parameters["decoder"][latents] = directions_LD
        self.parameters["encoder"][latents] = directions_LD * encoder_norm
        self.parameters["encoder_bias"][latents] = 0.0
        for name in ("encoder", "encoder_bias", "decoder"):
            self.means[name][latents] = 0.0
            self.squares[name][latents] = 0.0
            self.refresh(name, latents)
