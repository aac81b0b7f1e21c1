"""Where an SAE reads, in other libraries' words: TransformerLens' hook names, and modules of a transformers model.

Ours are `layers.6`, `layers.6.mlp` and the other sites of `lm/sites.py`, in the keys `layer` and `site` of an SAE's
configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwenscope.errors import FormatError

_MIXERS = {"attention": ".self_attn", "deltanet": ".linear_attn"}
"""What a layer of a kind calls its mixer."""
_MODULES = {"": "", ".mlp": ".mlp"}
_MODULES |= {".mlp_out": ".post_feedforward_layernorm", ".mixer_out": ".post_attention_layernorm"}
"""Modules whose output is read; the last two are what families that normalize a part's output call the norm."""
_TRANSFORMER_LENS = {"": "hook_resid_post", ".mlp": "hook_mlp_out", ".mixer": "hook_attn_out"}
_TRANSFORMER_LENS |= {".mlp_out": "hook_mlp_out", ".mixer_out": "hook_attn_out"}
_TRANSFORMER_LENS |= {".heads": "attn.hook_z", ".mid": "hook_resid_mid", ".mlp_in": "mlp.hook_in"}
_PARTS = {hook: part for part, hook in _TRANSFORMER_LENS.items() if not part.endswith("_out")}
_PARTS |= {"hook_resid_pre": "", "": "", "mlp": ".mlp", "mlp.hook_out": ".mlp", "pre_feedforward_layernorm": ".mlp_in"}
_PARTS |= dict.fromkeys(("attn", "self_attn", "linear_attn"), ".mixer")
_NORMALIZES = re.compile(r"gemma-?[23]|olmo-?2", re.IGNORECASE)
"""Families whose parts' outputs are normalized before they join the stream; TransformerLens hooks behind that."""
_HOOK = re.compile(r"blocks\.(\d{1,6})\.((?:(?:attn|mlp|ln2)\.)?hook_\w+)")
_MODULE = re.compile(r"(?:.*[._])?layers[._](\d{1,6})(?:\.(\w+?))?(?:\.output)?")


NORMS = {"zscore": "layer_norm", "rms": "constant_norm_rescale"}
"""What SAELens calls rows that are normalised one by one, by the last part of our name of such a site."""


def module_name(config: Mapping[str, Any]) -> str | None:
    """The module below the decoder whose output is read: `layers.22`, `layers.22.mlp`, `layers.22.self_attn`.

    None if the configuration names no layer, a mixer in a layer of unknown kind, or what a module takes.
    """
    part = _part(config)
    module = _MIXERS.get(str(config.get("kind"))) if part == ".mixer" else _MODULES.get(str(part))
    return None if module is None else f"layers.{config['layer']}{module}"


def transformer_lens_name(config: Mapping[str, Any]) -> str | None:
    """`blocks.22.hook_resid_post`, `.hook_mlp_out`, ...; None if the configuration names no layer."""
    part = _part(config)
    return None if part is None else f"blocks.{config['layer']}.{_TRANSFORMER_LENS[part]}"


def _part(config: Mapping[str, Any]) -> str | None:
    """What follows the layer in our name of the site: "", ".mlp", ".mixer", ..."""
    if "layer" not in config:
        return None
    part = str(config.get("site", f"layers.{config['layer']}")).removeprefix(f"layers.{config['layer']}")
    if norm := norm_of(config):
        part = part.removesuffix(f".{norm}")
    return part if part in _TRANSFORMER_LENS else None


def refuse_difference(config: Mapping[str, Any], sae_id: str, to: str) -> None:
    """FormatError where an SAE reads a difference of two models' rows, which no other library has a word for."""
    if (site := str(config.get("site"))).endswith(".diff"):
        raise FormatError(f"{sae_id}: {to} cannot say {site}, a difference of two models; share the run's folder")


def norm_of(config: Mapping[str, Any]) -> str | None:
    """How the rows that an SAE reads are normalised one by one, if they are."""
    return next((norm for norm in NORMS if str(config.get("site")).endswith(f".{norm}")), None)


def site_of(name: str, model: str = "") -> dict[str, Any]:
    """The keys `layer` and, unless it is the residual stream, `site` of a hook or module; empty for any other place.

    `model`: the language model's name; of some families a hook's rows are those behind the norm of a part's output.
    """
    hook = _HOOK.fullmatch(name)
    match = hook or _MODULE.fullmatch(name)
    part = _PARTS.get(match[2] or "") if match else None
    if match and match[2] == "ln2.hook_normalized" and _NORMALIZES.search(model):  # before the norm's own weights
        part = ".mid.rms"
    if match is None or part is None:
        return {}
    layer = int(match[1]) - (match[2] == "hook_resid_pre")  # what enters a layer is what left the one before
    if layer < 0:
        return {}
    if part in (".mlp", ".mixer") and hook and _NORMALIZES.search(model):
        part += "_out"
    return {"layer": layer} | ({"site": f"layers.{layer}{part}"} if part else {})
