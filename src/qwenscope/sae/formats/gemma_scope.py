"""Gemma Scope and Gemma Scope 2: `params.npz` or `params.safetensors` per SAE, JumpReLU, the input not centred.

W_enc [D, N], b_enc, W_dec [N, D], b_dec, threshold [N]; the second writes w_enc and w_dec. Language model and site
stand in the names of repository and folders only: `gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz`,
`gemma-scope-2-4b-it/resid_post/layer_17_width_16k_l0_medium/params.safetensors`. The SAEs of MLPs read behind the norm
that follows them, those of attention the heads before their output projection. Transcoders read what the MLP reads, of
the first Gemma Scope before the weights of its norm, and may have an affine_skip_connection [D, D]. https://huggingface.co/google/gemma-scope
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from qwenscope.errors import FormatError
from qwenscope.sae.activation import JumpReLU
from qwenscope.sae.formats.common import Parts, subtract_pre_bias
from qwenscope.sae.formats.tensors import read_npz, read_tensors

PARAMS = "params.*"
_SKIP = "affine_skip_connection"
_TENSORS = {"w_enc": 2, "b_enc": 1, "w_dec": 2, "b_dec": 1, "threshold": 1}
_REPO = re.compile(r"gemma-scope-(2-)?(\d+m|\d+b)-(pt|it)((?:-\w+)*)")
_PLACES = {"res": "", "resid_post": "", "mlp": ".mlp_out", "mlp_out": ".mlp_out", "att": ".heads", "attn_out": ".heads"}
_TRANSCODERS = {"transcoders": ".mid.rms", "transcoder": ".mlp_in"}
"""Where those of the first and of the second read; they predict what the MLP adds to the stream."""
_NO_SITES = {
    "embedding": "the embedding returns is no site",
    "crosscoder": "a crosscoder reads is several places",
    "clt": "a cross-layer transcoder predicts is several places",
}
"""What each kind that is refused would need."""


def read(path: Path, name: str) -> Parts:
    """The SAE of one parameter file.

    Args:
        path: the file.
        name: a text that holds the repository's name, such as the folder's path or the Hub id.

    Raises:
        FormatError: names that do not say model, layer and site, another kind than SAEs of a site, or a damaged file.
    """
    config = described(path, f"{name}/{path}")
    if path.suffix == ".npz":
        tensors = read_npz(path, {key.replace("w_", "W_"): rank for key, rank in _TENSORS.items()})
        tensors = {key.lower(): value for key, value in tensors.items()}
    elif path.suffix == ".safetensors":
        tensors = read_tensors(path, _TENSORS, {_SKIP: 2} if "target" in config else {})
    else:
        raise FormatError(f"{path} is neither params.npz nor params.safetensors")
    encoder, bias, decoder, pre_bias, threshold = (tensors[key] for key in _TENSORS)
    parts = Parts(path, encoder.T, bias, decoder, pre_bias, None, config, JumpReLU.name, threshold)
    if "target" in config:
        parts.target_bias_D, parts.pre_bias_D = pre_bias, torch.zeros(len(encoder), dtype=torch.float32)
        parts.skip_DD = tensors[_SKIP].T if _SKIP in tensors else None
    else:
        subtract_pre_bias(parts)
    return parts


def described(path: Path, text: str) -> dict[str, Any]:
    """The keys model, layer, site and target of the SAE at `path`.

    Args:
        path: of its parameter file.
        text: holds the names of repository and folders.

    Raises:
        FormatError: they do not say these, or it is no SAE of a site.
    """
    repo, layer = _REPO.search(text), re.search(r"layer_(\d{1,4})", text)
    folders = [part.removesuffix("_all") for part in path.parent.parts]
    kinds = [] if repo is None else [*folders, *repo[4].split("-")]
    if refused := next((kind for kind in kinds if kind in _NO_SITES), None):
        raise FormatError(f"{path}: {refused} is refused; what {_NO_SITES[refused]}")
    place = next((kind for kind in kinds if kind in _PLACES | _TRANSCODERS), None)
    if repo is None or layer is None or place is None:
        raise FormatError(
            f"{path}: Gemma Scope says model, layer and site by the names of repository and folders only; let them be "
            "called as there, such as gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
        )
    family, size, tuned = ("gemma-3", repo[2], f"-{repo[3]}") if repo[1] else ("gemma-2", repo[2], f"-{repo[3]}")
    if tuned == "-pt" and (family == "gemma-2" or size == "270m"):  # their base models have no suffix
        tuned = ""
    number = int(layer[1])
    config: dict[str, Any] = {"model": f"google/{family}-{size}{tuned}", "layer": number}
    if place in _TRANSCODERS:
        return config | {"site": f"layers.{number}{_TRANSCODERS[place]}", "target": f"layers.{number}.mlp_out"}
    return config | ({"site": f"layers.{number}{_PLACES[place]}"} if _PLACES[place] else {})
