"""EleutherAI sparsify (package eai-sparsify): `cfg.json` and `sae.safetensors` in one folder per hook point.

The folder is named by the module that is read, as sparsify and delphi look for it: `layers.22`. A checkpoint has one
SAE per module, so that further ones become checkpoints of their own, `<sae_id>/layers.22`. An SAE whose configuration
names no layer lies in a folder of its id.

encoder.weight [N, D], encoder.bias, W_dec [N, D], b_dec, which is subtracted before the encoder unless the coder is a
transcoder. https://github.com/EleutherAI/sparsify
"""

from __future__ import annotations

from pathlib import Path

from qwenscope.errors import FormatError
from qwenscope.files import read_json, write_json
from qwenscope.sae.activation import TopK
from qwenscope.sae.files import join_below
from qwenscope.sae.formats.common import (
    Parts,
    carried_config,
    refuse_unless,
    whole_number,
)
from qwenscope.sae.formats.hooks import module_name, site_of
from qwenscope.sae.formats.tensors import read_tensors, write_tensors
from qwenscope.sae.sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
ACTIVATIONS = (TopK.name,)


def write(sae: SAE, sae_id: str, out: Path) -> None:
    """Write one SAE so that `sparsify.SparseCoder.load_from_disk` gives the same codes and reconstructions."""
    module = module_name(sae.config)
    folder = join_below(out, module or sae_id)
    if folder.exists():
        folder = join_below(out, sae_id, module or sae_id)
    state = sae.state_dict()
    folder.mkdir(parents=True)
    write_tensors(
        folder / WEIGHTS,
        {
            "encoder.weight": state["encoder.weight"],
            "encoder.bias": state["encoder.bias"],
            "W_dec": state["decoder.weight"].T,
            "b_dec": state["pre_bias"],
        },
    )
    write_json(
        folder / CONFIG,
        {
            "activation": "topk",
            "d_in": sae.hidden_dim,
            "num_latents": sae.dict_size,
            "k": sae.k,
            "normalize_decoder": sae.config.get("decoder_unit_norm", True),
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "qwenscope": sae.config,
        },
    )


def read(folder: Path) -> Parts:
    """One SAE of a folder that sparsify wrote, or that `write` did.

    Raises:
        FormatError: groupmax, a skip connection, a transcoder, signed or missing values, or damaged files.
    """
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict):
        raise FormatError(f"{path} is not a JSON object")
    refuse_unless(
        path,
        config,
        {"activation": ("topk",), "skip_connection": (False,), "transcode": (False,), "signed": (False,)},
    )
    hidden_dim, k = whole_number(path, config, "d_in"), whole_number(path, config, "k")
    dict_size = config.get("num_latents") or hidden_dim * whole_number(path, config, "expansion_factor")
    tensors = read_tensors(folder / WEIGHTS, {"encoder.weight": 2, "encoder.bias": 1, "W_dec": 2, "b_dec": 1})
    parts = Parts(
        folder / WEIGHTS, tensors["encoder.weight"], tensors["encoder.bias"], tensors["W_dec"], tensors["b_dec"], k
    )
    if tuple(parts.encoder_ND.shape) != (dict_size, hidden_dim):
        shape = list(parts.encoder_ND.shape)
        raise FormatError(f"{folder / WEIGHTS}: encoder.weight has shape {shape}, not [{dict_size}, {hidden_dim}]")
    parts.config = carried_config(parts, config.get("qwenscope")) or site_of(folder.name)
    return parts
