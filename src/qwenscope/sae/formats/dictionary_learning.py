"""dictionary_learning: `ae.pt` (a pickled state dict) and `config.json` per SAE, whose `dict_class` says what is in it.

AutoEncoderTopK and BatchTopKSAE hold encoder.weight [N, D], encoder.bias, decoder.weight [D, N], b_dec, k and threshold
(one number, -1 = unset); the first encodes by the k largest of each token unless asked otherwise, so that its threshold
is left out, the second by its threshold. MatryoshkaBatchTopKSAE is the second with W_enc [D, N], W_dec [N, D], b_enc
and group_sizes. JumpReluAutoEncoder has those names and a threshold [N], the input not centred. AutoEncoder (ReLU) is
normalized where it is loaded, its decoder's norms moving into the encoder. GatedAutoEncoder becomes a JumpReLU.
Read by torch's restricted unpickler only. https://github.com/saprmarks/dictionary_learning
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenscope.errors import FormatError
from qwenscope.files import atomic_path, read_json, write_json
from qwenscope.sae.activation import BatchTopK, JumpReLU, ReLU, TopK
from qwenscope.sae.formats.common import (
    Parts,
    carried_config,
    fold_decoder_norms,
    fold_gate,
    has_unit_norms,
    subtract_pre_bias,
)
from qwenscope.sae.formats.tensors import read_pickle, refuse_extra
from qwenscope.sae.sae import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
WRITTEN = {
    TopK.name: ("AutoEncoderTopK", "TopKTrainer"),
    BatchTopK.name: ("BatchTopKSAE", "BatchTopKTrainer"),
    JumpReLU.name: ("JumpReluAutoEncoder", "JumpReluTrainer"),
    ReLU.name: ("AutoEncoder", "StandardTrainer"),
}
"""Class and trainer of each activation."""
_READ = {
    "AutoEncoderTopK": TopK.name,
    "BatchTopKSAE": BatchTopK.name,
    "MatryoshkaBatchTopKSAE": BatchTopK.name,
    "JumpReluAutoEncoder": JumpReLU.name,
    "GatedAutoEncoder": JumpReLU.name,
    "AutoEncoder": ReLU.name,
}
_LINEAR = {"encoder.weight": 2, "encoder.bias": 1, "decoder.weight": 2}
_PLAIN = {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1}
_TENSORS = {
    "AutoEncoderTopK": _LINEAR | {"b_dec": 1},
    "BatchTopKSAE": _LINEAR | {"b_dec": 1},
    "MatryoshkaBatchTopKSAE": _PLAIN,
    "JumpReluAutoEncoder": _PLAIN | {"threshold": 1},
    "GatedAutoEncoder": {"encoder.weight": 2, "mag_bias": 1, "decoder.weight": 2, "decoder_bias": 1}
    | {"r_mag": 1, "gate_bias": 1},
    "AutoEncoder": _LINEAR | {"bias": 1},
}
"""Of each class: encoder, bias, decoder and pre-bias first."""
_PARTS = {"mlp": "mlp", "attn": "mixer", "attention": "mixer"}


def write(sae: SAE, folder: Path) -> None:
    """Write one SAE so that `from_pretrained(folder / "ae.pt")` of its class gives the same results.

    The biases of a JumpReLU are rounded on the way, for its class does not centre the input.

    Raises:
        FormatError: a batch_topk SAE whose latents have different thresholds; the class has one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dict_class, trainer_class = WRITTEN[sae.activation.name]
    if dict_class == "BatchTopKSAE" and "prefixes" in sae.config:
        dict_class, trainer_class = "MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"
    with atomic_path(folder / WEIGHTS) as temporary:
        torch.save(_state(folder, sae, dict_class), temporary)
    trainer: dict[str, Any] = {
        "dict_class": dict_class,
        "trainer_class": trainer_class,
        "activation_dim": sae.hidden_dim,
        "dict_size": sae.dict_size,
        "k": sae.k,
        "layer": sae.config.get("layer"),
        "lm_name": sae.config.get("model"),
    }
    write_json(folder / CONFIG, {"trainer": trainer, "qwenscope": sae.config})


def _state(folder: Path, sae: SAE, dict_class: str) -> dict[str, Tensor]:
    """What `torch.save` gets: the state dict of the class."""
    state = {name: value.detach().float().cpu().contiguous() for name, value in sae.state_dict().items()}
    encoder, bias, decoder, pre_bias = (
        state[name] for name in ("encoder.weight", "encoder.bias", "decoder.weight", "pre_bias")
    )
    if dict_class == "JumpReluAutoEncoder":
        bias = (bias.double() - encoder.double() @ pre_bias.double()).float()
    if "W_enc" in _TENSORS[dict_class]:
        encoder, decoder = encoder.T.contiguous(), decoder.T.contiguous()
    tensors = dict(zip(_TENSORS[dict_class], (encoder, bias, decoder, pre_bias), strict=False))
    if dict_class == "JumpReluAutoEncoder":
        return tensors | {"threshold": state["threshold"]}
    if dict_class == "AutoEncoder":
        return tensors
    if dict_class == "MatryoshkaBatchTopKSAE":
        tensors["group_sizes"] = torch.tensor(sae.config["prefixes"]).diff(prepend=torch.zeros(1, dtype=torch.int64))
    threshold = torch.tensor(-1.0) if sae.threshold is None else _one(folder, state["threshold"])
    return tensors | {"k": torch.tensor(sae.k, dtype=torch.int), "threshold": threshold}


def _one(folder: Path, threshold_N: Tensor) -> Tensor:
    if not bool((threshold_N == threshold_N[0]).all()):
        raise FormatError(
            f"{folder.name}: thresholds differ between latents; dictionary_learning's BatchTopKSAE has one"
        )
    return threshold_N[0].clone()


def read(folder: Path) -> Parts:
    """One SAE of a folder that dictionary_learning wrote, or that `write` did.

    Raises:
        FormatError: another class than those of `_READ`, code in the pickle, or damaged files.
    """
    path = folder / WEIGHTS
    config = read_json(folder / CONFIG)
    trainer = config.get("trainer") if isinstance(config, dict) else None
    if not isinstance(trainer, dict):
        raise FormatError(f"{folder / CONFIG} has no trainer section")
    dict_class = str(trainer.get("dict_class"))
    if dict_class not in _READ:
        known = ", ".join(_READ)
        raise FormatError(f"{folder / CONFIG}: dict_class {trainer.get('dict_class')!r} is refused; only {known} fit")
    names, activation = _TENSORS[dict_class], _READ[dict_class]
    tensors = read_pickle(path, names)
    refuse_extra(path, tensors, {*names, "k", "threshold", "group_sizes"})
    encoder, bias, decoder, pre_bias = (tensors[name] for name in list(names)[:4])
    if "W_enc" in names:
        encoder = encoder.T
    else:
        decoder = decoder.T
    parts = Parts(path, encoder, bias, decoder, pre_bias, None, {}, activation)
    if activation in (TopK.name, BatchTopK.name):
        parts.k = _k(path, tensors, trainer)
    if activation == BatchTopK.name:
        parts.threshold_N = _threshold(path, tensors).expand(len(bias))
    if dict_class == "JumpReluAutoEncoder":
        parts.threshold_N = tensors["threshold"]
        subtract_pre_bias(parts)
    elif dict_class == "GatedAutoEncoder":
        fold_gate(parts, tensors["r_mag"], tensors["gate_bias"])
    parts.config = carried_config(parts, config.get("qwenscope"))
    if parts.config:
        parts.changed.clear()  # it undid what `write` did
    else:
        parts.config = _describe(trainer) | _prefixes(path, tensors)
        if dict_class == "AutoEncoder" and not has_unit_norms(parts.decoder_ND, 1e-5):
            fold_decoder_norms(parts)
    return parts


def _k(path: Path, tensors: dict[str, Tensor], trainer: dict[str, Any]) -> int:
    k = tensors.get("k")
    if k is None or k.numel() != 1 or k.is_floating_point() or int(k) != trainer.get("k", int(k)):
        raise FormatError(f"{path}: k is missing, or differs from the {trainer.get('k')!r} of {CONFIG}")
    return int(k)


def _threshold(path: Path, tensors: dict[str, Tensor]) -> Tensor:
    """The one threshold of a BatchTopKSAE."""
    threshold = tensors.get("threshold")
    if threshold is None or threshold.numel() != 1 or not bool(threshold.isfinite()) or bool(threshold < 0):
        raise FormatError(f"{path}: threshold is missing or unset (-1); train beyond its first 1,000 steps")
    return threshold.reshape(())


def _prefixes(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The key `prefixes` of a Matryoshka SAE: where its nested dictionaries end."""
    sizes = tensors.get("group_sizes")
    if sizes is None:
        return {}
    if sizes.dim() != 1 or sizes.is_floating_point() or sizes.is_complex() or len(sizes) > 1 << 16:
        raise FormatError(f"{path}: group_sizes is no list of whole numbers")
    return {"prefixes": list(accumulate(sizes.tolist()))}


def _describe(trainer: dict[str, Any]) -> dict[str, Any]:
    """Language model and site; `submodule_name` is such as `mlp_layer_3` or `resid_post_layer_3`."""
    config: dict[str, Any] = {}
    if isinstance(trainer.get("lm_name"), str) and trainer["lm_name"]:
        config["model"] = trainer["lm_name"]
    if isinstance(trainer.get("layer"), int):
        config["layer"] = trainer["layer"]
        if part := _PARTS.get(str(trainer.get("submodule_name")).partition("_")[0]):
            config["site"] = f"layers.{trainer['layer']}.{part}"
    return config
