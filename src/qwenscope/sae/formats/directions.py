"""Directions of chosen latents, for those who steer where they serve: a control vector of llama.cpp, or safetensors.

A direction is a latent's decoder column scaled to length 1, times a strength in the units of the rows. llama.cpp adds
`direction.N` (float32 [D]) of a GGUF file to the residual stream after layer N, from layer 1 on; several latents of a
layer are added up. Served by `llama-server --control-vector FILE`. https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from qwenscope.errors import FormatError, ResourceError
from qwenscope.files import atomic_path
from qwenscope.sae.sae import SAE

CONTROL_VECTOR, DIRECTIONS = "control-vector.gguf", "directions.safetensors"


@dataclass(frozen=True, slots=True)
class Push:
    """One chosen latent, and how far to push along its direction."""

    sae_id: str
    latent: int
    strength: float

    def vector_D(self, saes: Mapping[str, SAE]) -> Tensor:  # noqa: N802
        """`strength` along the latent's direction, float32 [D].

        Raises:
            FormatError: there is no such SAE or latent, or the strength is no number.
        """
        if self.sae_id not in saes:
            raise FormatError(f"there is no SAE {self.sae_id}; there are {', '.join(saes)}")
        sae = saes[self.sae_id]
        if not 0 <= self.latent < sae.dict_size:
            raise FormatError(f"{self.sae_id} has no latent {self.latent}; it has 0 to {sae.dict_size - 1}")
        if not math.isfinite(self.strength):
            raise FormatError(f"a strength of {self.strength} is no number to push by")
        return self.strength * normalize(sae.decoder.weight.detach()[:, self.latent].float().cpu(), dim=0)


def write_control_vector(saes: Mapping[str, SAE], pushes: Sequence[Push], out: Path) -> None:
    """Write `out/control-vector.gguf`.

    Raises:
        FormatError: an SAE that does not read the residual stream of layer 1 or a later one, language models or widths
            that differ, or as `Push.vector_D`.
        ResourceError: the package gguf is not installed.
    """
    layers: dict[int, Tensor] = {}
    for push in pushes:
        vector_D, config = push.vector_D(saes), saes[push.sae_id].config
        layer, site = config.get("layer"), config.get("target", config.get("site"))
        if layer is None or (site is not None and site != f"layers.{layer}"):
            where = site or config.get("hook_name") or "an unknown site"
            raise FormatError(f"{push.sae_id} reads {where}; a control vector is added to the residual stream alone")
        if layer == 0:
            raise FormatError(f"{push.sae_id} reads layer 0, where llama.cpp adds no control vector; from 1 on it does")
        if layer in layers:
            vector_D = layers[layer] + vector_D
        layers[layer] = vector_D
    chosen = {push.sae_id: saes[push.sae_id] for push in pushes}
    models = {str(sae.config.get("model", "")) for sae in chosen.values()}
    if len(models) != 1 or len({sae.hidden_dim for sae in chosen.values()}) != 1:
        raise FormatError(f"{', '.join(chosen)} are not of one language model; write a control vector for each")
    with atomic_path(out / CONTROL_VECTOR) as temporary:
        writer = _gguf().GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", models.pop())
        writer.add_uint32("controlvector.layer_count", len(layers))
        for layer, vector_D in sorted(layers.items()):
            writer.add_tensor(f"direction.{layer}", vector_D.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ResourceError("control vectors need the package gguf; pip install gguf") from None


def write_directions(saes: Mapping[str, SAE], pushes: Sequence[Push], out: Path) -> None:
    """Write `out/directions.safetensors`: a tensor `<sae_id>.<latent>` each, float32 [D], with its layer and site.

    The metadata `directions` say in JSON, tensor by tensor, what it is of.

    Raises:
        FormatError: a latent that is named twice, or as `Push.vector_D`.
    """
    tensors, about = {}, {}
    for push in pushes:
        name = f"{push.sae_id}.{push.latent}"
        if name in tensors:
            raise FormatError(f"latent {push.latent} of {push.sae_id} is named twice")
        tensors[name] = push.vector_D(saes).contiguous()
        config = saes[push.sae_id].config
        about[name] = asdict(push) | {key: config[key] for key in ("model", "layer", "site", "target") if key in config}
    with atomic_path(out / DIRECTIONS) as temporary:
        save_file(tensors, temporary, metadata={"directions": json.dumps(about)})
