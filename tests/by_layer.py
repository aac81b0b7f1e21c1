"""The residual stream by layer number, for tests of models that are hooked nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qwenscope.lm.forward import site_rows
from qwenscope.lm.model import LanguageModel


def residual_streams(lm: LanguageModel, input_ids_CT: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """{layer: x_CTD} after each of `layers`, in their order."""
    return {site.layer: x_CTD for site, x_CTD in site_rows(lm, input_ids_CT, list(layers)).items()}
