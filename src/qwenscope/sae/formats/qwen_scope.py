"""Qwen-Scope, the Qwen team's own suite: `layer<n>.sae.pt` files, W_enc [N, D], W_dec [D, N], b_enc, b_dec.

Their encoder sees the residual stream without b_dec subtracted, so b_dec moves into the encoder bias. k and N stand
in the repository's name only, as in `SAE-Res-<model>-W32K-L0_50`. Read by torch's restricted unpickler only.
"""

from __future__ import annotations

import re
from pathlib import Path

from qwenscope.errors import FormatError
from qwenscope.sae.formats.common import Parts, subtract_pre_bias
from qwenscope.sae.formats.tensors import read_pickle, refuse_extra

FILE = re.compile(r"layer(\d+)\.sae\.pt")
_NAME = re.compile(r"SAE-Res-([^/]+)-W(\d+)K-L0_(\d+)")


def read(path: Path, name: str) -> Parts:
    """The SAE of one `layer<n>.sae.pt`.

    Args:
        path: the file.
        name: a text that holds the repository's name, such as the folder's path or the Hub id.

    Raises:
        FormatError: no k in the name, another width than the name says, code in the pickle, or a damaged file.
    """
    layer, described = FILE.fullmatch(path.name), _NAME.search(f"{name}/{path.parent}")
    if layer is None:
        raise FormatError(f"{path} is not named layer<n>.sae.pt")
    if described is None:
        raise FormatError(
            f"{path}: k stands in Qwen-Scope's repository names only; let the folder be called as the repository, "
            "such as SAE-Res-Qwen3.5-35B-A3B-Base-W32K-L0_50"
        )
    names = {"W_enc": 2, "W_dec": 2, "b_enc": 1, "b_dec": 1}
    tensors = read_pickle(path, names)
    refuse_extra(path, tensors, names)
    dict_size = 1024 * int(described[2])
    if len(tensors["W_enc"]) != dict_size:
        raise FormatError(f"{path}: W_enc has {len(tensors['W_enc']):,} latents, but the name says {dict_size:,}")
    parts = Parts(path, tensors["W_enc"], tensors["b_enc"], tensors["W_dec"].T, tensors["b_dec"], int(described[3]))
    subtract_pre_bias(parts)
    parts.config = {"sae_id": f"layer{layer[1]}", "layer": int(layer[1]), "model": f"Qwen/{described[1]}"}
    return parts
