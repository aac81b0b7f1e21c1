"""What the formats share: a neutral SAE, exact re-parametrisations, and what their configurations say.

Legend: D hidden, N latents, K active latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenscope.errors import FormatError
from qwenscope.sae.activation import ACTIVATIONS, TopK, described
from qwenscope.sae.files import check_config, check_finite
from qwenscope.sae.sae import SAE

_UNIT_TOLERANCE = 1e-4
_ROUNDING = 1e-6


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
    target_bias_D: Tensor | None = None
    """Of a transcoder, whose prediction is latents decoder_ND + target_bias_D + skip_DD x; `config` has its target."""
    skip_DD: Tensor | None = None
    changed: list[str] = field(default_factory=list)
    """Exact re-parametrisations that were applied; each rounds weights by at most half a float32 unit."""
    stored: list[str] = field(init=False)
    """Dtypes of the matrices in the file."""

    def __post_init__(self) -> None:
        self.stored = sorted({str(value.dtype).removeprefix("torch.") for value in (self.encoder_ND, self.decoder_ND)})


def subtract_pre_bias(parts: Parts) -> None:
    """From pre-activations `E x + b` to ours, `E (x - p) + b'`: b' = b + E p, summed in float64."""
    _check_shapes(parts)
    pre_bias_D = parts.pre_bias_D.double()
    product_N = torch.cat([rows_RD.double() @ pre_bias_D for rows_RD in torch.split(parts.encoder_ND, 1 << 16)])
    parts.bias_N = (parts.bias_N.double() + product_N).float()
    parts.changed.append("encoder bias takes in encoder @ pre_bias, as the input was not centred before the encoder")


def scale_input(parts: Parts, scale: float, what: str) -> None:
    """From an SAE of rows times `scale`, whose reconstruction is divided by it, to one of the rows themselves.

    `what` names the scale where it was found.
    """
    if not 0 < scale < float("inf"):
        raise FormatError(f"{parts.where}: {what} must be a number above 0, not {scale!r}")
    parts.encoder_ND = (parts.encoder_ND.double() * scale).float()
    parts.decoder_ND = (parts.decoder_ND.double() / scale).float()
    parts.pre_bias_D = (parts.pre_bias_D.double() / scale).float()
    parts.changed.append(f"encoder rows times, decoder rows and pre_bias divided by {scale!r} ({what})")


def fold_gate(parts: Parts, log_scale_N: Tensor, gate_bias_N: Tensor) -> None:
    """From a gated SAE whose two paths share the encoder's directions (Rajamanoharan et al. 2024) to a JumpReLU.

    With e = E (x - p) a latent is e exp(r) + b where e + g > 0 and that value is above 0. Hence it is what is above
    b - g exp(r), with the encoder's rows times exp(r); in float64, so that only rounding moves the gate.
    """
    _check_shapes(parts)
    for name, tensor in {"scale": log_scale_N, "bias": gate_bias_N}.items():
        if tensor.shape != parts.bias_N.shape:
            raise FormatError(
                f"{parts.where}: the gate's {name} has shape {list(tensor.shape)}, unlike the encoder bias"
            )
    scale_N = log_scale_N.double().exp()
    parts.encoder_ND = (parts.encoder_ND.double() * scale_N[:, None]).float()
    parts.threshold_N = (parts.bias_N.double() - gate_bias_N.double() * scale_N).float()
    parts.changed.append("encoder rows take in the gate's scale, thresholds its bias (gated SAE as JumpReLU)")


def has_unit_norms(decoder_ND: Tensor, tolerance: float = _ROUNDING) -> bool:
    """Whether all decoder norms are 1 but for float32 rounding, so that multiplying by them changes nothing else."""
    return bool(((decoder_ND.detach().double().norm(dim=1) - 1).abs() < tolerance).all())


def fold_decoder_norms(parts: Parts) -> None:
    """From a selection by pre-activations times decoder norms, or above 0, to ours: the norms move into the encoder.

    The selection acted on the scaled pre-activations, so nothing about the codes changes but their unit.
    """
    _check_shapes(parts)
    norm_N = parts.decoder_ND.double().norm(dim=1)
    if not bool((norm_N > 0).all()):
        raise FormatError(f"{parts.where}: a decoder direction is 0, so its norm cannot move into the encoder")
    parts.encoder_ND = (parts.encoder_ND.double() * norm_N[:, None]).float()
    parts.bias_N = (parts.bias_N.double() * norm_N).float()
    parts.decoder_ND = (parts.decoder_ND.double() / norm_N[:, None]).float()
    parts.changed.append("encoder rows and biases take in the decoder norms")


def build(parts: Parts, origin: str) -> SAE:
    """The `SAE` of `parts`: float32, shapes checked, weights otherwise kept bit for bit.

    Decoder directions of another norm than 1 stay as they are, for the activation compares pre-activations, and
    rescaling them would change which latents are active; `decoder_unit_norm: false` in the configuration says so.

    Raises:
        FormatError: shapes that do not fit each other, an impossible k, or keys that no configuration can have.
    """
    _check_shapes(parts)
    dict_size, hidden_dim = parts.encoder_ND.shape
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
    if parts.target_bias_D is not None:
        config |= {"target_dim": len(parts.target_bias_D)} | ({} if parts.skip_DD is None else {"skip": True})
    if bool((parts.decoder_ND.float().norm(dim=1) - 1).abs().max() > _UNIT_TOLERANCE):
        config["decoder_unit_norm"] = False
    weights = {
        "encoder.weight": parts.encoder_ND.float().contiguous(),
        "encoder.bias": parts.bias_N.float().contiguous(),
        "decoder.weight": parts.decoder_ND.float().contiguous().T,
        "pre_bias": parts.pre_bias_D.float().contiguous(),
    }
    extra = {"threshold": parts.threshold_N, "decoder.bias": parts.target_bias_D, "skip.weight": parts.skip_DD}
    weights |= {name: tensor.float().contiguous() for name, tensor in extra.items() if tensor is not None}
    for name, tensor in weights.items():
        check_finite(parts.where, f"{name}, as float32 and re-parametrised,", tensor)
    return SAE.of(check_config(parts.where, config), weights)


def _check_shapes(parts: Parts) -> None:
    """FormatError naming the first tensor that does not fit the encoder, or a transcoder's decoder."""
    dict_size, hidden_dim = parts.encoder_ND.shape
    target_dim = hidden_dim if parts.target_bias_D is None else len(parts.target_bias_D)
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "encoder bias": (parts.bias_N, (dict_size,)),
        "decoder": (parts.decoder_ND, (dict_size, target_dim)),
        "decoder bias": (parts.pre_bias_D, (hidden_dim,)),
        "threshold": (parts.threshold_N, (dict_size,)),
        "skip": (parts.skip_DD, (target_dim, hidden_dim)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise FormatError(
                f"{parts.where}: {name} has shape {list(tensor.shape)}, not {list(shape)} as the encoder implies"
            )


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
