"""dictionary_learning's AutoEncoderTopK: `ae.pt` (a pickled state dict) and `config.json` per SAE.

encoder.weight [N, D], encoder.bias, decoder.weight [D, N], b_dec, k, threshold (-1 = unset). Read by torch's
restricted unpickler only. https://github.com/saprmarks/dictionary_learning
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qwenscope.errors import FormatError
from qwenscope.files import atomic_path, read_json, write_json
from qwenscope.sae.formats.common import Parts, carried_config, read_pickle
from qwenscope.sae.topk import TopKSAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
_CLASS = "AutoEncoderTopK"
_KNOWN = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"}


def write(sae: TopKSAE, folder: Path) -> None:
    """Write one SAE so that `AutoEncoderTopK.from_pretrained(folder / "ae.pt")` gives the same results."""
    state = {name: value.detach().float().cpu().contiguous() for name, value in sae.state_dict().items()}
    state["b_dec"] = state.pop("pre_bias")
    state |= {"k": torch.tensor(sae.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / WEIGHTS) as temporary:
        torch.save(state, temporary)
    trainer: dict[str, Any] = {
        "dict_class": _CLASS,
        "trainer_class": "TopKTrainer",
        "activation_dim": sae.hidden_dim,
        "dict_size": sae.dict_size,
        "k": sae.k,
        "layer": sae.config.get("layer"),
        "lm_name": sae.config.get("model"),
    }
    write_json(folder / CONFIG, {"trainer": trainer, "qwenscope": sae.config})


def read(folder: Path) -> Parts:
    """One SAE of a folder that dictionary_learning wrote, or that `write` did.

    Raises:
        FormatError: another class than AutoEncoderTopK, a set threshold, code in the pickle, or damaged files.
    """
    path = folder / WEIGHTS
    config = read_json(folder / CONFIG)
    trainer = config.get("trainer") if isinstance(config, dict) else None
    if not isinstance(trainer, dict):
        raise FormatError(f"{folder / CONFIG} has no trainer section")
    if trainer.get("dict_class") != _CLASS:
        raise FormatError(f"{folder / CONFIG}: dict_class {trainer.get('dict_class')!r} is refused; only {_CLASS} fits")
    tensors = read_pickle(path, {"encoder.weight": 2, "encoder.bias": 1, "decoder.weight": 2, "b_dec": 1})
    if extra := sorted(set(tensors) - _KNOWN):
        raise FormatError(f"{path}: tensor {extra[0]} cannot be represented by a TopK SAE")
    k = tensors.get("k")
    if k is None or k.numel() != 1 or k.is_floating_point() or int(k) != trainer.get("k", int(k)):
        raise FormatError(f"{path}: k is missing, or differs from the {trainer.get('k')!r} of {CONFIG}")
    threshold = tensors.get("threshold")
    if threshold is not None and not bool((threshold == -1).all()):
        raise FormatError(
            f"{path}: threshold {threshold.flatten()[0].item():.4g} cannot be represented by a TopK SAE; if you use "
            "its per-token TopK only, set it to -1 (unset) in the state dict and import again"
        )
    parts = Parts(
        path, tensors["encoder.weight"], tensors["encoder.bias"], tensors["decoder.weight"].T, tensors["b_dec"], int(k)
    )
    parts.config = carried_config(parts, config.get("qwenscope")) or _describe(trainer)
    return parts


def _describe(trainer: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if isinstance(trainer.get("lm_name"), str):
        config["model"] = trainer["lm_name"]
    if isinstance(trainer.get("layer"), int):
        config["layer"] = trainer["layer"]
    return config
