"""Where an SAE reads, in other libraries' words: TransformerLens' hook names, and modules of a transformers model.

Ours are `layers.6`, `layers.6.mlp` and `layers.6.mixer`, in the keys `layer` and `site` of an SAE's configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_MIXERS = {"attention": ".self_attn", "deltanet": ".linear_attn"}
"""What a layer of a kind calls its mixer."""
_PARTS = {"hook_resid_post": "", "": "", "hook_mlp_out": ".mlp", "mlp": ".mlp"} | dict.fromkeys(
    ("hook_attn_out", "attn", "self_attn", "linear_attn"), ".mixer"
)
_TRANSFORMER_LENS = {"": "hook_resid_post", ".mlp": "hook_mlp_out", ".mixer": "hook_attn_out"}
_HOOK = re.compile(r"blocks\.(\d{1,6})\.(hook_\w+)")
_MODULE = re.compile(r"(?:.*[._])?layers[._](\d{1,6})(?:\.(\w+))?")


def module_name(config: Mapping[str, Any]) -> str | None:
    """The module below the decoder whose output is read: `layers.22`, `layers.22.mlp`, `layers.22.self_attn`.

    None if the configuration names no layer, or a mixer in a layer of unknown kind.
    """
    part = _part(config)
    if part == ".mixer":
        part = _MIXERS.get(str(config.get("kind")))
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


def site_of(name: str) -> dict[str, Any]:
    """The keys `layer` and, unless it is the residual stream, `site` of a hook or module; empty for any other place."""
    match = _HOOK.fullmatch(name) or _MODULE.fullmatch(name)
    part = _PARTS.get(match[2] or "") if match else None
    if match is None or part is None:
        return {}
    layer = int(match[1])
    return {"layer": layer} | ({"site": f"layers.{layer}{part}"} if part else {})
