"""Where an SAE reads, in other libraries' words: TransformerLens' hook names, and modules of a transformers model.

Ours are `layers.6`, `layers.6.mlp`, `layers.6.mixer` and the last two with `_out`, in the keys `layer` and `site` of an
SAE's configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_MIXERS = {"attention": ".self_attn", "deltanet": ".linear_attn"}
"""What a layer of a kind calls its mixer."""
_BEHIND = {".mlp_out": ".post_feedforward_layernorm", ".mixer_out": ".post_attention_layernorm"}
"""What families that normalize a part's output call the norm."""
_PARTS = {"hook_resid_post": "", "hook_resid_pre": "", "": "", "hook_mlp_out": ".mlp", "mlp": ".mlp"} | dict.fromkeys(
    ("hook_attn_out", "attn", "self_attn", "linear_attn"), ".mixer"
)
_TRANSFORMER_LENS = {"": "hook_resid_post", ".mlp": "hook_mlp_out", ".mixer": "hook_attn_out"}
_TRANSFORMER_LENS |= {".mlp_out": "hook_mlp_out", ".mixer_out": "hook_attn_out"}
_NORMALIZES = re.compile(r"gemma-?[23]|olmo-?2", re.IGNORECASE)
"""Families whose parts' outputs are normalized before they join the stream; TransformerLens hooks behind that."""
_HOOK = re.compile(r"blocks\.(\d{1,6})\.(hook_\w+)")
_MODULE = re.compile(r"(?:.*[._])?layers[._](\d{1,6})(?:\.(\w+))?")


def module_name(config: Mapping[str, Any]) -> str | None:
    """The module below the decoder whose output is read: `layers.22`, `layers.22.mlp`, `layers.22.self_attn`.

    None if the configuration names no layer, or a mixer in a layer of unknown kind.
    """
    part = _part(config)
    if part == ".mixer":
        part = _MIXERS.get(str(config.get("kind")))
    elif part in _BEHIND:
        part = _BEHIND[part]
    return None if part is None else f"layers.{config['layer']}{part}"


def transformer_lens_name(config: Mapping[str, Any]) -> str | None:
    """`blocks.22.hook_resid_post`, `.hook_mlp_out` or `.hook_attn_out`; None if the configuration names no layer."""
    part = _part(config)
    return None if part is None else f"blocks.{config['layer']}.{_TRANSFORMER_LENS[part]}"


def _part(config: Mapping[str, Any]) -> str | None:
    """What follows the layer in our name of the site: "", ".mlp" or ".mixer"."""
    if "layer" not in config:
        return None
    part = str(config.get("site", f"layers.{config['layer']}")).removeprefix(f"layers.{config['layer']}")
    return part if part in _TRANSFORMER_LENS else None


def site_of(name: str, model: str = "") -> dict[str, Any]:
    """The keys `layer` and, unless it is the residual stream, `site` of a hook or module; empty for any other place.

    `model`: the language model's name; of some families a hook's rows are those behind the norm of a part's output.
    """
    hook = _HOOK.fullmatch(name)
    match = hook or _MODULE.fullmatch(name)
    part = _PARTS.get(match[2] or "") if match else None
    if match is None or part is None:
        return {}
    layer = int(match[1]) - (match[2] == "hook_resid_pre")  # what enters a layer is what left the one before
    if layer < 0:
        return {}
    if part and hook and _NORMALIZES.search(model):
        part += "_out"
    return {"layer": layer} | ({"site": f"layers.{layer}{part}"} if part else {})
