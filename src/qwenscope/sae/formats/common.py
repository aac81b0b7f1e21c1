"""What the formats share: a neutral SAE, reading other libraries' files safely, and exact re-parametrisations.

Legend: D hidden, N latents, K active latents.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwenscope.errors import FormatError
from qwenscope.files import atomic_path
from qwenscope.sae.loading import check_finite, check_sae_id
from qwenscope.sae.topk import TopKSAE

_UNIT_TOLERANCE = 1e-4
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class Parts:
    """An SAE in canonical orientation, as read from a file and before it becomes a `TopKSAE`.

    latents = TopK(ReLU(encoder_ND (x - pre_bias_D) + bias_N)); reconstruction = latents decoder_ND + pre_bias_D.
    """

    where: Path
    """The file they come from, for messages."""
    encoder_ND: Tensor
    bias_N: Tensor
    decoder_ND: Tensor
    pre_bias_D: Tensor
    k: int
    config: dict[str, Any] = field(default_factory=dict)
    """Keys to keep beside the three sizes."""
    changed: list[str] = field(default_factory=list)
    """Exact re-parametrisations that were applied; each rounds weights by at most half a float32 unit."""


def subtract_pre_bias(parts: Parts) -> None:
    """From pre-activations `E x + b` to ours, `E (x - p) + b'`: b' = b + E p, summed in float64."""
    product_N = parts.encoder_ND.double() @ parts.pre_bias_D.double()
    parts.bias_N = (parts.bias_N.double() + product_N).float()
    parts.changed.append("encoder bias takes in encoder @ pre_bias, as the input was not centred before the encoder")


def fold_decoder_norms(parts: Parts) -> None:
    """From a TopK over pre-activations times decoder norms to ours: the norms move into the encoder.

    The selection acted on the scaled pre-activations, so nothing about the codes changes but their unit.
    """
    norm_N = parts.decoder_ND.double().norm(dim=1)
    if not bool((norm_N > 0).all()):
        raise FormatError(f"{parts.where}: a decoder direction is 0, so rescale_acts_by_decoder_norm cannot be undone")
    parts.encoder_ND = (parts.encoder_ND.double() * norm_N[:, None]).float()
    parts.bias_N = (parts.bias_N.double() * norm_N).float()
    parts.decoder_ND = (parts.decoder_ND.double() / norm_N[:, None]).float()
    parts.changed.append("encoder rows and biases take in the decoder norms (rescale_acts_by_decoder_norm)")


def build(parts: Parts, origin: str) -> TopKSAE:
    """The `TopKSAE` of `parts`: float32, shapes checked, weights otherwise kept bit for bit.

    Decoder directions of another norm than 1 stay as they are, for TopK compares pre-activations, and rescaling them
    would change which latents are active; `decoder_unit_norm: false` in the configuration says so.

    Raises:
        FormatError: shapes that do not fit each other, or an impossible k.
    """
    dict_size, hidden_dim = parts.encoder_ND.shape
    shapes = {"encoder bias": (parts.bias_N, (dict_size,)), "decoder": (parts.decoder_ND, (dict_size, hidden_dim))}
    for name, (tensor, shape) in (shapes | {"decoder bias": (parts.pre_bias_D, (hidden_dim,))}).items():
        if tuple(tensor.shape) != shape:
            raise FormatError(
                f"{parts.where}: {name} has shape {list(tensor.shape)}, not {list(shape)} as the encoder implies"
            )
    stored = {str(value.dtype).removeprefix("torch.") for value in (parts.encoder_ND, parts.decoder_ND)}
    if parts.k > dict_size:
        raise FormatError(f"{parts.where}: k {parts.k} exceeds the {dict_size} latents")
    with torch.device("meta"):
        sae = TopKSAE(hidden_dim, dict_size, parts.k)
    state = {
        "encoder.weight": parts.encoder_ND.float().contiguous(),
        "encoder.bias": parts.bias_N.float().contiguous(),
        "decoder.weight": parts.decoder_ND.float().contiguous().T,
        "pre_bias": parts.pre_bias_D.float().contiguous(),
    }
    sae.load_state_dict(state, assign=True)
    imported: dict[str, Any] = {"from": origin}
    if stored != {"float32"}:
        imported["stored_dtype"] = ", ".join(sorted(stored))
    if parts.changed:
        imported["changed"] = parts.changed
    ours = "hidden_dim" in parts.config and len(imported) == 1
    sae.config |= parts.config | ({} if ours else {"imported": imported})
    if bool((parts.decoder_ND.float().norm(dim=1) - 1).abs().max() > _UNIT_TOLERANCE):
        sae.config["decoder_unit_norm"] = False
    return sae


def read_pickle(path: Path, names: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors of a `torch.save`d state dict, by torch's restricted unpickler: no code in the file can run.

    Args:
        path: the file.
        names: the floating tensors it must hold, with their numbers of dimensions; further tensors are kept.

    Raises:
        FormatError: not such a file, code in the pickle, a tensor is missing, of another rank or type, or not finite.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split(".")[0].splitlines()[0]
        raise FormatError(f"{path} is refused: its pickle asks for more than tensors ({reason})") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise FormatError(f"{path} is not a whole file of tensors ({error}); download it again") from None
    if not isinstance(loaded, dict):
        raise FormatError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    _check_tensors(path, tensors, names)
    return tensors


def read_tensors(path: Path, names: Mapping[str, int]) -> dict[str, Tensor]:
    """All tensors of a safetensors file, which must be exactly those in `names`; errors as `read_pickle`."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a whole safetensors file ({error}); download it again") from None
    if extra := sorted(set(tensors) - set(names)):
        raise FormatError(f"{path}: tensor {extra[0]} cannot be represented by a TopK SAE")
    _check_tensors(path, tensors, names)
    return tensors


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], names: Mapping[str, int]) -> None:
    for name, dimensions in names.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise FormatError(f"{path}: tensor {name} is missing; it holds {', '.join(sorted(tensors)) or 'none'}")
        if tensor.dtype not in _FLOATS or tensor.dim() != dimensions or not tensor.numel() or tensor.is_sparse:
            kind = f"{list(tensor.shape)} of {tensor.dtype}"
            raise FormatError(f"{path}: {name} is {kind}, not a floating tensor of {dimensions} dimensions")
        check_finite(path, name, tensor)


def refuse_unless(path: Path, config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """FormatError naming the first key of `config` whose value a TopK SAE cannot represent (absent keys pass)."""
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise FormatError(f"{path}: {key}={config[key]!r} cannot be represented by a TopK SAE; refused")


def whole_number(path: Path, config: Mapping[str, Any], key: str) -> int:
    """`config[key]`, a whole number above 0, or a FormatError that names it."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FormatError(f"{path}: {key} must be a whole number above 0, not {value!r}")
    return value


def carried_config(parts: Parts, carried: Any) -> dict[str, Any]:
    """Our own configuration that an export of ours carries along, if it is one of this very SAE."""
    sizes = (parts.encoder_ND.shape[1], parts.encoder_ND.shape[0], parts.k)
    if not isinstance(carried, dict) or tuple(carried.get(key) for key in ("hidden_dim", "dict_size", "k")) != sizes:
        return {}
    if "sae_id" in carried:
        check_sae_id(carried["sae_id"])
    return dict(carried)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous float32 tensors as safetensors, whole or not at all."""
    plain = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})
