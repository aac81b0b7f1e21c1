"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors` per SAE, JumpReLU of rows scaled to a norm.

encoder.weight [N, D], encoder.bias, decoder.weight [D, N], decoder.bias, the input not centred. Rows are scaled so that
their mean norm in the data is sqrt(D); the one threshold is in the units of unscaled rows, as SAELens' loader has it.
https://huggingface.co/fnlp/Llama-Scope
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from qwenscope.errors import FormatError
from qwenscope.files import read_json
from qwenscope.sae.activation import JumpReLU
from qwenscope.sae.formats.common import Parts, refuse_unless, scale_input, subtract_pre_bias, whole_number
from qwenscope.sae.formats.hooks import site_of
from qwenscope.sae.formats.tensors import read_tensors

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_MODEL = "meta-llama/Llama-3.1-8B"
_TENSORS = {"encoder.weight": 2, "encoder.bias": 1, "decoder.weight": 2, "decoder.bias": 1}


def read(folder: Path) -> Parts:
    """The SAE in a folder such as `Llama3_1-8B-Base-L15R-8x`.

    Raises:
        FormatError: another activation than JumpReLU, a transcoder, hyperparameters that are missing, or damaged files.
    """
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict):
        raise FormatError(f"{path} is not a JSON object")
    reads = config.get("hook_point_in")
    if reads != config.get("hook_point_out"):
        raise FormatError(f"{path}: a transcoder is refused; it predicts {config.get('hook_point_out')!r}")
    refuse_unless(
        path,
        config,
        {
            "act_fn": ("jumprelu", "JumpReLU"),
            "norm_activation": ("dataset-wise",),
            "apply_decoder_bias_to_pre_encoder": (False,),
            "use_glu_encoder": (False,),
        },
    )
    tensors = read_tensors(folder / WEIGHTS, _TENSORS)
    encoder, bias, decoder, pre_bias = (tensors[name] for name in _TENSORS)
    hidden_dim = whole_number(path, config, "d_model")
    if encoder.shape != (whole_number(path, config, "d_sae"), hidden_dim):
        raise FormatError(f"{folder / WEIGHTS}: encoder.weight has shape {list(encoder.shape)}, not d_sae x d_model")
    norms = config.get("dataset_average_activation_norm")
    norm = _number(path, norms if isinstance(norms, dict) else {}, "in")
    scale = math.sqrt(hidden_dim) / norm
    threshold = torch.full_like(bias, _number(path, config, "jump_relu_threshold") * scale, dtype=torch.float32)
    where = site_of(str(reads), _MODEL) or {"hook_name": str(reads)}
    parts = Parts(
        folder / WEIGHTS,
        encoder,
        bias,
        decoder.T,
        pre_bias,
        None,
        {"model": _MODEL} | where,
        JumpReLU.name,
        threshold,
    )
    scale_input(parts, scale, "dataset_average_activation_norm")
    subtract_pre_bias(parts)
    return parts


def _number(path: Path, config: dict[str, Any], key: str) -> float:
    value = config.get(key)
    if not isinstance(value, float | int) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise FormatError(f"{path}: {key} must be a number above 0, not {value!r}")
    return float(value)
