"""The stand-in with wider Gated DeltaNet heads: vLLM's CPU kernel takes 128 values per head, the stand-in has 32.

Zeros fill the heads up. Products and the L2 norm do not see them. In the gated norm the mean square falls to 32 / 128,
which the norm's weight makes good, and to 32 / 128 again by the query's scale of 1 / sqrt(width), which the norm undoes
but for its epsilon: that is lowered as much.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwenscope.lm.standin import STANDIN_FOLDER

HEAD, WIDTH = 32, 128


def make_padded_standin(folder: Path) -> Path:
    """Write the padded checkpoint to `folder`."""
    shutil.copytree(STANDIN_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"linear_key_head_dim": WIDTH, "linear_value_head_dim": WIDTH}
    config["rms_norm_eps"] *= (HEAD / WIDTH) ** 2
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file({key: _padded(key, tensor) for key, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def _padded(key: str, tensor: Tensor) -> Tensor:
    if key.endswith(("linear_attn.in_proj_qkv.weight", "linear_attn.conv1d.weight", "linear_attn.in_proj_z.weight")):
        return _fill(tensor)
    if key.endswith("linear_attn.out_proj.weight"):
        return _fill(tensor.T).T.contiguous()
    if key.endswith("linear_attn.norm.weight"):
        return _fill(tensor) * (HEAD / WIDTH) ** 0.5
    return tensor


def _fill(tensor: Tensor) -> Tensor:
    """Heads lie one behind the other in the first dimension."""
    heads = tensor.unflatten(0, (-1, HEAD))
    zeros = torch.zeros(heads.shape[0], WIDTH - HEAD, *heads.shape[2:], dtype=tensor.dtype)
    return torch.cat([heads, zeros], dim=1).flatten(0, 1)
