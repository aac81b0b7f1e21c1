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
from qwenscope.sae.activation import ACTIVATIONS, TopK, described
from qwenscope.sae.files import check_config, check_finite
from qwenscope.sae.sae import SAE

_UNIT_TOLERANCE = 1e-4
_ROUNDING = 1e-6
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class Parts:
    """An SAE in canonical orientation, as read from a file and before it becomes an `SAE`.

    latents = activation(encoder_ND (x - pre_bias_D) + bias_N); reconstruction = latents decoder_ND + pre_bias_D.
    """

    where: Path
    """The file they come from, for messages."""
    encoder_ND: Tensor
    bias_N: Tensor
    decoder_ND: Tensor
    pre_bias_D: Tensor
    k: int | None
    """None where the format has none: then every latent may be active at once."""
    config: dict[str, Any] = field(default_factory=dict)
    """Keys to keep beside the three sizes."""
    activation: str = TopK.name
    threshold_N: Tensor | None = None
    changed: list[str] = field(default_factory=list)
    """Exact re-parametrisations that were applied; each rounds weights by at most half a float32 unit."""
    stored: list[str] = field(init=False)
    """Dtypes of the matrices in the file."""

    def __post_init__(self) -> None:
        self.stored = sorted({str(value.dtype).removeprefix("torch.") for value in (self.encoder_ND, self.decoder_ND)})


def subtract_pre_bias(parts: Parts) -> None:
    """From pre-activations `E x + b` to ours, `E (x - p) + b'`: b' = b + E p, summed in float64."""
    product_N = parts.encoder_ND.double() @ parts.pre_bias_D.double()
    parts.bias_N = (parts.bias_N.double() + product_N).float()
    parts.changed.append("encoder bias takes in encoder @ pre_bias, as the input was not centred before the encoder")


def has_unit_norms(decoder_ND: Tensor) -> bool:
    """Whether all decoder norms are 1 but for float32 rounding, so that multiplying by them changes nothing else."""
    return bool(((decoder_ND.detach().double().norm(dim=1) - 1).abs() < _ROUNDING).all())


def fold_decoder_norms(parts: Parts) -> None:
    """From a selection by pre-activations times decoder norms to ours: the norms move into the encoder.

    The selection acted on the scaled pre-activations, so nothing about the codes changes but their unit.
    """
    norm_N = parts.decoder_ND.double().norm(dim=1)
    if not bool((norm_N > 0).all()):
        raise FormatError(f"{parts.where}: a decoder direction is 0, so rescale_acts_by_decoder_norm cannot be undone")
    parts.encoder_ND = (parts.encoder_ND.double() * norm_N[:, None]).float()
    parts.bias_N = (parts.bias_N.double() * norm_N).float()
    parts.decoder_ND = (parts.decoder_ND.double() / norm_N[:, None]).float()
    parts.changed.append("encoder rows and biases take in the decoder norms (rescale_acts_by_decoder_norm)")


def build(parts: Parts, origin: str) -> SAE:
    """The `SAE` of `parts`: float32, shapes checked, weights otherwise kept bit for bit.

    Decoder directions of another norm than 1 stay as they are, for the activation compares pre-activations, and
    rescaling them would change which latents are active; `decoder_unit_norm: false` in the configuration says so.

    Raises:
        FormatError: shapes that do not fit each other, an impossible k, or keys that no configuration can have.
    """
    dict_size, hidden_dim = parts.encoder_ND.shape
    shapes = {"encoder bias": (parts.bias_N, (dict_size,)), "decoder": (parts.decoder_ND, (dict_size, hidden_dim))}
    shapes["decoder bias"] = (parts.pre_bias_D, (hidden_dim,))
    if parts.threshold_N is not None:
        shapes["threshold"] = (parts.threshold_N, (dict_size,))
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise FormatError(
                f"{parts.where}: {name} has shape {list(tensor.shape)}, not {list(shape)} as the encoder implies"
            )
    k = dict_size if parts.k is None else parts.k
    if k > dict_size:
        raise FormatError(f"{parts.where}: k {k} exceeds the {dict_size} latents")
    config: dict[str, Any] = {"hidden_dim": hidden_dim, "dict_size": dict_size, "k": k}
    config |= described(parts.activation)
    imported: dict[str, Any] = {"from": origin}
    if parts.stored != ["float32"]:
        imported["stored_dtype"] = ", ".join(parts.stored)
    if parts.changed:
        imported["changed"] = parts.changed
    ours = "hidden_dim" in parts.config and len(imported) == 1
    config |= parts.config | ({} if ours else {"imported": imported})
    if bool((parts.decoder_ND.float().norm(dim=1) - 1).abs().max() > _UNIT_TOLERANCE):
        config["decoder_unit_norm"] = False
    weights = {
        "encoder.weight": parts.encoder_ND.float().contiguous(),
        "encoder.bias": parts.bias_N.float().contiguous(),
        "decoder.weight": parts.decoder_ND.float().contiguous().T,
        "pre_bias": parts.pre_bias_D.float().contiguous(),
    }
    if parts.threshold_N is not None:
        weights["threshold"] = parts.threshold_N.float().contiguous()
    return SAE.of(check_config(parts.where, config), weights)


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
        raise FormatError(f"{path}: tensor {extra[0]} cannot be represented here")
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
    """FormatError naming the first key of `config` whose value cannot be represented (absent keys pass)."""
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise FormatError(f"{path}: {key}={config[key]!r} cannot be represented here; refused")


def whole_number(path: Path, config: Mapping[str, Any], key: str) -> int:
    """`config[key]`, a whole number above 0, or a FormatError that names it."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FormatError(f"{path}: {key} must be a whole number above 0, not {value!r}")
    return value


def carried_config(parts: Parts, carried: Any) -> dict[str, Any]:
    """Our own configuration that an export of ours carries along, if it is one of this very SAE.

    `parts` takes k from it where the format has none, and the activation where it stands under a kin's name.
    """
    sizes = {"hidden_dim": parts.encoder_ND.shape[1], "dict_size": parts.encoder_ND.shape[0]}
    if parts.k is not None:
        sizes["k"] = parts.k
    if not isinstance(carried, dict) or any(carried.get(key) != value for key, value in sizes.items()):
        return {}
    carried = check_config(parts.where, dict(carried))
    activation = carried.get("activation", TopK.name)
    if ACTIVATIONS[activation].has_threshold != (parts.threshold_N is not None):
        return {}
    parts.activation, parts.k = activation, carried["k"]
    return dict(carried)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous float32 tensors as safetensors, whole or not at all."""
    plain = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})
