"""SAELens 6: `cfg.json` and `sae_weights.safetensors` per SAE, with W_enc [D, N], b_enc, W_dec [N, D], b_dec.

Its "topk" is ours to the bit when apply_b_dec_to_input is true and rescale_acts_by_decoder_norm is false; SAEs with
other settings of these two are re-parametrised on import. A BatchTopK SAE is there, as in SAELens' own saves, the
"jumprelu" that it is once trained; what is above 0 alone is called "standard". https://github.com/decoderesearch/SAELens
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qwenscope.errors import FormatError
from qwenscope.files import read_json, write_json
from qwenscope.sae.activation import BatchTopK, JumpReLU, ReLU, TopK
from qwenscope.sae.formats.common import (
    Parts,
    carried_config,
    fold_decoder_norms,
    read_tensors,
    refuse_unless,
    subtract_pre_bias,
    whole_number,
    write_tensors,
)
from qwenscope.sae.sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = {
    TopK.name: "topk",
    BatchTopK.name: "jumprelu",
    JumpReLU.name: "jumprelu",
    ReLU.name: "standard",
}
"""What an activation is called."""
_READ = {"topk": TopK.name, "jumprelu": JumpReLU.name, "standard": ReLU.name}
_RESIDUAL = re.compile(r"(?:blocks\.(?=\d+\.hook_resid_post$)|(?:.*\.)?layers\.)(\d+)(?:\.hook_resid_post)?")
"""The stream after a layer: TransformerLens' name for it, or the layer's own in a transformers model."""
_SCHEMA_VERSION = "6.0.0"  # the first whose loader reads this cfg.json as it stands


def write(sae: SAE, folder: Path) -> None:
    """Write one SAE so that `sae_lens.SAE.load_from_disk(folder)` gives the same codes and reconstructions."""
    state = sae.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    threshold = {} if sae.threshold is None else {"threshold": sae.threshold}
    write_tensors(
        folder / WEIGHTS,
        {
            "W_enc": state["encoder.weight"].T,
            "b_enc": state["encoder.bias"],
            "W_dec": state["decoder.weight"].T,
            "b_dec": state["pre_bias"],
            **threshold,
        },
    )
    architecture = ARCHITECTURES[sae.activation.name]
    is_topk = architecture == "topk"
    write_json(
        folder / CONFIG,
        {
            "architecture": architecture,
            "d_in": sae.hidden_dim,
            "d_sae": sae.dict_size,
            **({"k": sae.k} if is_topk else {}),
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            **({"rescale_acts_by_decoder_norm": False} if is_topk else {}),
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": _metadata(sae.config),
        },
    )


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"sae_lens_version": _SCHEMA_VERSION, "sae_lens_training_version": None}
    if "model" in config:
        metadata["model_name"] = config["model"]
    if "layer" in config:
        metadata["hook_name"] = f"blocks.{config['layer']}.hook_resid_post"
        metadata["hf_hook_name"] = f"model.layers.{config['layer']}"
    return {**metadata, "prepend_bos": False, "qwenscope": config}


def read(folder: Path) -> Parts:
    """One SAE of a folder that SAELens 6 wrote, or that `write` did.

    Raises:
        FormatError: another architecture than those of `ARCHITECTURES`, activations that are normalised or reshaped, or
            damaged files.
    """
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict):
        raise FormatError(f"{path} is not a JSON object")
    metadata = config.get("metadata")
    if not isinstance(metadata, dict) or not metadata.get("sae_lens_version"):
        raise FormatError(f"{path} was written by SAELens below 6; load and save it with SAELens 6 first")
    activation = _READ.get(str(config.get("architecture")))
    if activation is None:
        raise FormatError(f"{path}: architecture {config.get('architecture')!r} cannot be represented here")
    refuse_unless(path, config, {"normalize_activations": ("none", None), "reshape_activations": ("none", None)})
    hidden_dim, dict_size = (whole_number(path, config, key) for key in ("d_in", "d_sae"))
    names = {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1} | ({"threshold": 1} if activation == JumpReLU.name else {})
    tensors = read_tensors(folder / WEIGHTS, names)
    parts = Parts(
        folder / WEIGHTS,
        tensors["W_enc"].T,
        tensors["b_enc"],
        tensors["W_dec"],
        tensors["b_dec"],
        whole_number(path, config, "k") if activation == TopK.name else None,
        activation=activation,
        threshold_N=tensors.get("threshold"),
    )
    if parts.encoder_ND.shape != (dict_size, hidden_dim):
        raise FormatError(f"{folder / WEIGHTS}: W_enc has shape {list(tensors['W_enc'].shape)}, not d_in x d_sae")
    parts.config = carried_config(parts, metadata.get("qwenscope")) or _describe(metadata)
    if not config.get("apply_b_dec_to_input", True):
        subtract_pre_bias(parts)
    if config.get("rescale_acts_by_decoder_norm", False):
        fold_decoder_norms(parts)
    return parts


def _describe(metadata: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if isinstance(metadata.get("model_name"), str) and metadata["model_name"]:
        config["model"] = metadata["model_name"]
    hook = str(metadata.get("hook_name") or "")
    if match := _RESIDUAL.fullmatch(hook):
        config["layer"] = int(match[1])
    elif hook:
        config["hook_name"] = hook
    return config
