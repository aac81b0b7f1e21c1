"""dictionary_learning: `ae.pt` (a pickled state dict) and `config.json` per SAE, whose `dict_class` says what is in it.

AutoEncoderTopK and BatchTopKSAE: encoder.weight [N, D], encoder.bias, decoder.weight [D, N], b_dec, k, threshold (one
number, -1 = unset). The first encodes by the k largest of each token unless asked otherwise, so that its threshold,
which training sets from step 1,000 on, is left out; the second by its threshold. JumpReluAutoEncoder: W_enc [D, N],
b_enc, W_dec [N, D], b_dec, threshold [N], the input not centred. Read by torch's restricted unpickler only.
https://github.com/saprmarks/dictionary_learning
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenscope.errors import FormatError
from qwenscope.files import atomic_path, read_json, write_json
from qwenscope.sae.activation import BatchTopK, JumpReLU, TopK
from qwenscope.sae.formats.common import Parts, carried_config, read_pickle, subtract_pre_bias
from qwenscope.sae.sae import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
ACTIVATIONS = (TopK.name, BatchTopK.name)
_CLASSES = {
    "AutoEncoderTopK": TopK.name,
    "BatchTopKSAE": BatchTopK.name,
    "JumpReluAutoEncoder": JumpReLU.name,
}
_TOPK = {"encoder.weight": 2, "encoder.bias": 1, "decoder.weight": 2, "b_dec": 1}
_JUMPRELU = {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1, "threshold": 1}


def write(sae: SAE, folder: Path) -> None:
    """Write one SAE so that `from_pretrained(folder / "ae.pt")` of its class gives the same results."""
    state = {name: value.detach().float().cpu().contiguous() for name, value in sae.state_dict().items()}
    state["b_dec"] = state.pop("pre_bias")
    is_topk = sae.activation.name == TopK.name
    threshold = torch.tensor(-1.0) if is_topk else _one(folder, state["threshold"])
    state |= {"k": torch.tensor(sae.k, dtype=torch.int), "threshold": threshold}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / WEIGHTS) as temporary:
        torch.save(state, temporary)
    trainer: dict[str, Any] = {
        "dict_class": "AutoEncoderTopK" if is_topk else "BatchTopKSAE",
        "trainer_class": "TopKTrainer" if is_topk else "BatchTopKTrainer",
        "activation_dim": sae.hidden_dim,
        "dict_size": sae.dict_size,
        "k": sae.k,
        "layer": sae.config.get("layer"),
        "lm_name": sae.config.get("model"),
    }
    write_json(folder / CONFIG, {"trainer": trainer, "qwenscope": sae.config})


def _one(folder: Path, threshold_N: Tensor) -> Tensor:
    if not bool((threshold_N == threshold_N[0]).all()):
        raise FormatError(
            f"{folder.name}: thresholds differ between latents; dictionary_learning's BatchTopKSAE has one"
        )
    return threshold_N[0].clone()


def read(folder: Path) -> Parts:
    """One SAE of a folder that dictionary_learning wrote, or that `write` did.

    Raises:
        FormatError: another class than the three, code in the pickle, or damaged files.
    """
    path = folder / WEIGHTS
    config = read_json(folder / CONFIG)
    trainer = config.get("trainer") if isinstance(config, dict) else None
    if not isinstance(trainer, dict):
        raise FormatError(f"{folder / CONFIG} has no trainer section")
    activation = _CLASSES.get(str(trainer.get("dict_class")))
    if activation is None:
        name, known = trainer.get("dict_class"), ", ".join(_CLASSES)
        raise FormatError(f"{folder / CONFIG}: dict_class {name!r} is refused; only {known} fit")
    is_jumprelu = activation == JumpReLU.name
    names = _JUMPRELU if is_jumprelu else _TOPK
    tensors = read_pickle(path, names)
    if extra := sorted(set(tensors) - set(names) - {"k", "threshold"}):
        raise FormatError(f"{path}: tensor {extra[0]} cannot be represented here")
    if is_jumprelu:
        encoder, bias, decoder, pre_bias, _ = (tensors[name] for name in names)
        parts = Parts(path, encoder.T, bias, decoder, pre_bias, None, {}, activation, tensors["threshold"])
        subtract_pre_bias(parts)
    else:
        encoder, bias, decoder, pre_bias = (tensors[name] for name in names)
        parts = Parts(path, encoder, bias, decoder.T, pre_bias, _k(path, tensors, trainer), {}, activation)
        if activation == BatchTopK.name:
            parts.threshold_N = _threshold(path, tensors).expand(len(bias))
    parts.config = carried_config(parts, config.get("qwenscope")) or _describe(trainer)
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


def _describe(trainer: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, tuple[str, type]] = {"model": ("lm_name", str), "layer": ("layer", int)}
    return {
        key: trainer[name]
        for key, (name, kind) in kinds.items()
        if isinstance(trainer.get(name), kind) and trainer[name] != ""
    }
