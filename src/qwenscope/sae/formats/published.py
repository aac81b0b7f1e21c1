"""The layout of the published SAEs, which is ours: `<sae_id>/config.json` and `weights.safetensors`.

Reading it as an import accepts half precision as well and converts it to float32.
"""

from __future__ import annotations

from pathlib import Path

from qwenscope.sae.activation import TopK
from qwenscope.sae.files import CONFIG_FILE, WEIGHTS_FILE, read_config, read_safetensors, weight_shapes
from qwenscope.sae.formats.common import Parts

_DTYPES = ("F32", "BF16", "F16", "F64")


def read(folder: Path) -> Parts:
    """One SAE of the published layout.

    Raises:
        FormatError: a file is missing, damaged, or does not fit the configuration.
    """
    config = read_config(folder / CONFIG_FILE)
    weights = read_safetensors(folder / WEIGHTS_FILE, weight_shapes(config), _DTYPES)
    return Parts(
        folder / WEIGHTS_FILE,
        weights["encoder.weight"],
        weights["encoder.bias"],
        weights["decoder.weight"].T,
        weights["pre_bias"],
        config["k"],
        config,
        config.get("activation", TopK.name),
        weights.get("threshold"),
        weights.get("decoder.bias"),
        weights.get("skip.weight"),
    )
