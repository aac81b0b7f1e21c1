"""SAELens 6: `cfg.json` and `sae_weights.safetensors` per SAE, with W_enc [D, N], b_enc, W_dec [N, D], b_dec.

Its "topk" is ours when apply_b_dec_to_input is true; other SAEs are re-parametrised on import. Decoder norms of 1 are
said with rescale_acts_by_decoder_norm, for its fold_W_dec_norm and what stands on it refuse a TopK SAE without. A
BatchTopK SAE, Matryoshka or not, is there, as in SAELens' own saves, the "jumprelu" that it is once trained; its
training checkpoints hold one topk_threshold. What is above 0 alone is called "standard"; "gated" becomes a JumpReLU.
The configurations of SAELens below 6 are read as SAELens 6 reads them. https://github.com/decoderesearch/SAELens
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenscope.errors import FormatError
from qwenscope.files import read_json, write_json
from qwenscope.sae.activation import BatchTopK, JumpReLU, ReLU, TopK
from qwenscope.sae.formats.common import (
    Parts,
    carried_config,
    fold_decoder_norms,
    fold_gate,
    has_unit_norms,
    refuse_unless,
    scale_input,
    subtract_pre_bias,
    whole_number,
)
from qwenscope.sae.formats.hooks import NORMS, module_name, norm_of, site_of, transformer_lens_name
from qwenscope.sae.formats.tensors import read_tensors, write_tensors
from qwenscope.sae.sae import SAE

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
ARCHITECTURES = {
    TopK.name: "topk",
    BatchTopK.name: "jumprelu",
    JumpReLU.name: "jumprelu",
    ReLU.name: "standard",
}
"""What an activation is called."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """An architecture: the activation that it has here, and its tensors beside W_enc, W_dec and b_dec."""

    activation: str
    tensors: dict[str, int]
    transcodes: bool = False


_BATCH = _Kind(BatchTopK.name, {"b_enc": 1, "topk_threshold": 0})
_READ = {
    "topk": _Kind(TopK.name, {"b_enc": 1}),
    "jumprelu": _Kind(JumpReLU.name, {"b_enc": 1, "threshold": 1}),
    "standard": _Kind(ReLU.name, {"b_enc": 1}),
    "gated": _Kind(JumpReLU.name, {"b_mag": 1, "r_mag": 1, "b_gate": 1}),
    "batchtopk": _BATCH,
    "matryoshka_batchtopk": _BATCH,
}
_TRANSCODERS = {
    (base, skips): f"{prefix}{'skip_' if skips else ''}transcoder"
    for base, prefix in (("standard", ""), ("jumprelu", "jumprelu_"))
    for skips in (False, True)
}
"""What a transcoder is called, by its activation and whether it has a skip connection."""
_READ |= {
    name: _Kind(_READ[base].activation, _READ[base].tensors | ({"W_skip": 2} if skips else {}), transcodes=True)
    for (base, skips), name in _TRANSCODERS.items()
}
_SCHEMA_VERSION = "6.0.0"  # the first whose loader reads this cfg.json as it stands
_CONTEXT = 1024
"""Tokens of a sequence that SAELens evaluates on; it takes a whole number and no other sign of what rows were."""


def write(sae: SAE, folder: Path) -> None:
    """Write one SAE so that `sae_lens.SAE.load_from_disk(folder)` gives the same codes and reconstructions."""
    state = sae.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    named = {"W_enc": state["encoder.weight"].T, "b_enc": state["encoder.bias"], "W_dec": state["decoder.weight"].T}
    named["b_dec"] = state["pre_bias"]
    architecture, own = ARCHITECTURES[sae.activation.name], dict[str, Any]()
    if sae.threshold is not None:
        named["threshold"] = sae.threshold
    if "target" in sae.config:
        architecture, own = _transcoder(sae, architecture, named)
    write_tensors(folder / WEIGHTS, named)
    is_topk, metadata = architecture == "topk", _metadata(sae.config)
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
            **own,
            **({"rescale_acts_by_decoder_norm": has_unit_norms(sae.decoder.weight.T)} if is_topk else {}),
            "normalize_activations": NORMS.get(str(norm_of(sae.config)), "none"),
            "reshape_activations": "hook_z" if str(metadata.get("hook_name")).endswith("hook_z") else "none",
            "metadata": metadata,
        },
    )


def _transcoder(sae: SAE, base: str, named: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """A transcoder's architecture and what its configuration has of its own; `named` tensors become those of one."""
    skips = sae.skip is not None
    if (base, skips) not in _TRANSCODERS:
        raise FormatError(f"SAELens has no transcoder whose activation is {sae.activation.name}")
    named["b_enc"] = (named["b_enc"].double() - named["W_enc"].double().T @ named["b_dec"].double()).float()
    named["b_dec"] = sae.decoder.bias
    if sae.skip is not None:
        named["W_skip"] = sae.skip.weight
    return _TRANSCODERS[base, skips], {"d_out": sae.target_dim, "apply_b_dec_to_input": False}


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """What SAELens' loaders of models and of activations take: a transformers model, and a module of it by name."""
    metadata: dict[str, Any] = {"sae_lens_version": _SCHEMA_VERSION, "sae_lens_training_version": None}
    if "model" in config:
        metadata |= {"model_name": config["model"], "model_class_name": "AutoModelForCausalLM"}
    if module := module_name(config):
        metadata |= {"hook_name": f"model.{module}", "hf_hook_name": f"model.{module}"}
    elif hook := transformer_lens_name(config):
        metadata["hook_name"] = hook
    if "target" in config:
        layer = int(config["target"].split(".")[1])
        metadata["hook_name_out"] = transformer_lens_name({"layer": layer, "site": config["target"]})
    return {**metadata, "context_size": _CONTEXT, "prepend_bos": False, "qwenscope": config}


def read(folder: Path) -> Parts:
    """One SAE of a folder that SAELens wrote, or that `write` did.

    Raises:
        FormatError: another architecture than those of `_READ`, activations that are normalised by a factor that is not
            in the folder, row by row, or reshaped, or damaged files.
    """
    path = folder / CONFIG
    config = _modern(path, read_json(path))
    kind = _READ.get(str(config.get("architecture")))
    if kind is None:
        known = ", ".join(_READ)
        raise FormatError(f"{path}: architecture {config.get('architecture')!r} is refused; only {known} fit")
    scale = _scale(folder, config)
    reshaped = ("none", None, "hook_z")  # heads side by side are what our rows are
    refuse_unless(path, config, {"reshape_activations": reshaped, "activation_fn": ("relu", "topk")})
    hidden_dim, dict_size = (whole_number(path, config, key) for key in ("d_in", "d_sae"))
    tensors = _tensors(folder / WEIGHTS, {"W_enc": 2, "W_dec": 2, "b_dec": 1} | kind.tensors)
    parts = Parts(
        folder / WEIGHTS,
        tensors["W_enc"].T,
        tensors["b_mag" if "b_mag" in tensors else "b_enc"],
        tensors["W_dec"],
        tensors["b_dec"],
        _k(path, config) if kind.activation in (TopK.name, BatchTopK.name) else None,
        activation=kind.activation,
        threshold_N=tensors.get("threshold"),
    )
    if parts.encoder_ND.shape != (dict_size, hidden_dim):
        raise FormatError(f"{folder / WEIGHTS}: W_enc has shape {list(tensors['W_enc'].shape)}, not d_in x d_sae")
    metadata = config["metadata"]
    rescaled = config.get("rescale_acts_by_decoder_norm", False)
    if kind is _BATCH:
        threshold = tensors["topk_threshold"].double() / (scale if rescaled else 1.0)
        parts.threshold_N = threshold.float().expand(dict_size)
    parts.config = carried_config(parts, metadata.get("qwenscope")) or _describe(path, config) | _prefixes(config)
    if kind.transcodes:
        _transcode(parts, path, config, tensors.get("W_skip"))
    if scale != 1:
        scale_input(parts, scale, SCALER)
    if "r_mag" in tensors:
        fold_gate(parts, tensors["r_mag"], tensors["b_gate"])
    if not config.get("apply_b_dec_to_input", True) and not kind.transcodes:
        subtract_pre_bias(parts)
    if rescaled and not has_unit_norms(parts.decoder_ND):
        fold_decoder_norms(parts)
    return parts


def _transcode(parts: Parts, path: Path, config: dict[str, Any], skip_DD: Tensor | None) -> None:
    """Make a transcoder of `parts`: its decoder's bias is the prediction's, and its input is not centred."""
    refuse_unless(path, config, {"normalize_activations": ("none", None), "apply_b_dec_to_input": (False,)})
    parts.target_bias_D, parts.skip_DD = parts.pre_bias_D, skip_DD
    parts.pre_bias_D = torch.zeros(parts.encoder_ND.shape[1], dtype=torch.float32)
    hook = str(config["metadata"].get("hook_name_out"))
    where = site_of(hook, str(parts.config.get("model")))
    if not where and "target" not in parts.config:
        raise FormatError(f"{path}: hook_name_out {hook!r} is no site, so what the transcoder predicts is not known")
    parts.config.setdefault("target", where.get("site", f"layers.{where.get('layer')}"))


def _modern(path: Path, config: Any) -> dict[str, Any]:
    """A configuration as SAELens 6 has it: one of SAELens below 6 has the language model's keys among its own."""
    if not isinstance(config, dict):
        raise FormatError(f"{path} is not a JSON object")
    if isinstance(config.get("metadata"), dict):
        return config
    config = {"hook_name": config.get("hook_point"), "activation_fn": config.get("activation_fn_str"), **config}
    if config["activation_fn"] is None:
        config["activation_fn"] = "relu"
    options = config.get("activation_fn_kwargs")
    if config["activation_fn"] == "topk" and isinstance(options, dict):
        config |= {"architecture": "topk", "k": options.get("k")}
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    return {"architecture": "standard", **config, "metadata": config}


def _scale(folder: Path, config: dict[str, Any]) -> float:
    """By what rows are multiplied before the encoder, and the reconstruction is divided.

    Raises:
        FormatError: they are normalised in another way, or nothing says the factor.
    """
    path = folder / CONFIG
    if config.get("normalize_activations") != "expected_average_only_in":
        refuse_unless(path, config, {"normalize_activations": ("none", None, *NORMS.values())})
        return 1.0
    if not (folder / SCALER).is_file():
        raise FormatError(
            f"{path}: normalize_activations='expected_average_only_in', and no {SCALER} says the factor; where "
            "SAELens' registry does, load the SAE there by its name, and import what save_model writes"
        )
    scaler = read_json(folder / SCALER)
    scale = scaler.get("scaling_factor") if isinstance(scaler, dict) else None
    if not isinstance(scale, float | int) or isinstance(scale, bool) or not 0 < scale < float("inf"):
        raise FormatError(f"{folder / SCALER}: scaling_factor must be a number above 0, not {scale!r}")
    return float(scale)


def _tensors(path: Path, names: dict[str, int]) -> dict[str, Tensor]:
    """The tensors of one SAE; SAELens below 6 may have written a scaling_factor of ones beside them."""
    tensors = read_tensors(path, names, {"scaling_factor": 1})
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not torch.allclose(factor.float(), torch.ones(1)):
        raise FormatError(f"{path}: its scaling_factor is not 1, which cannot be represented here")
    return tensors


def _k(path: Path, config: dict[str, Any]) -> int:
    """Active latents per row; a mean, as BatchTopK has it, may be a fraction."""
    k = config.get("k")
    return whole_number(path, {"k": round(k)} if isinstance(k, float) and 1 <= k < 1 << 31 else config, "k")


def _prefixes(config: dict[str, Any]) -> dict[str, Any]:
    widths = config.get("matryoshka_widths")
    return {"prefixes": widths} if widths else {}


def _describe(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Language model and site, or the hook's name where it is none of our sites."""
    metadata, told = config["metadata"], dict[str, Any]()
    if isinstance(metadata.get("model_name"), str) and metadata["model_name"]:
        told["model"] = metadata["model_name"]
    hook = str(metadata.get("hook_name") or "")
    where = site_of(hook, told.get("model", "")) or site_of(str(metadata.get("hf_hook_name")))
    if norm := next((ours for ours, theirs in NORMS.items() if theirs == config.get("normalize_activations")), None):
        if not where:
            raise FormatError(f"{path}: rows are normalised one by one, and {hook!r} is no site; refused")
        where["site"] = ".".join((where.get("site", f"layers.{where['layer']}"), norm))
    return told | (where or ({"hook_name": hook} if hook else {}))
