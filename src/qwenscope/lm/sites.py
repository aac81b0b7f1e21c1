"""Where a dictionary reads: a site is a place in a decoder whose rows are captured, replaced and steered.

    Site("layers.6")            the residual stream after layer 6
    Site("layers.6.mixer")      what its attention, Gated DeltaNet or other mixer of positions returns
    Site("layers.6.mixer_out")  what that adds to the stream
    Site("layers.6.mlp")        what its MLP or mixture of experts returns
    Site("layers.6.mlp_out")    what that adds to the stream
    Site("layers.6.heads")      what its mixer hands to its output projection: the heads of an attention side by side
    Site("layers.6.mid")        the residual stream between mixer and MLP
    Site("layers.6.mlp_in")     what its MLP or mixture of experts reads
    Site("layers.6.mlp.rms")    rows of any of these, normalised one by one: divided by their root mean square;
                                `zscore` subtracts a row's mean and divides by its deviation

    Site("layers.6.diff")       rows of a second model less those of the first, at any of these that is not normalised

`mixer` and `mlp` differ from `mixer_out` and `mlp_out` in families that normalise a part's output before adding it
(Gemma 2 and 3, OLMo 2): they are read before that norm. The last three are what a module takes, not what it returns. A
further kind of site is one more entry of `KINDS`, and nothing else. What takes the place of a normalised row is given
the mean and size that the row had.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import total_ordering
from typing import Any, Protocol, Union

import torch
from torch import Tensor, nn

from qwenscope.errors import ModelError, RecipeError
from qwenscope.recipe import HookPoint, Recipe

_NAME = re.compile(r"layers\.(0|[1-9]\d{0,5})((?:\.\w+)*)")
_MIXERS = frozenset({
    "attention", "attn", "conv", "linear_attn", "mamba", "mixer", "mlstm_layer", "multi_head_attention",
    "self_attention", "self_attn", "temporal_block",
})  # fmt: skip
_MLPS = frozenset({"block_sparse_moe", "feed_forward", "ffn", "mlp", "mlp_block", "shared_mlp"})
_PROJECTIONS = frozenset({"c_proj", "dense", "linear_out", "o_proj", "out_proj", "Wo"})
_NORMS = frozenset({
    "channel_pre_norm", "feedforward_layernorm", "ffn_norm", "layernorm2", "ln2", "ln_2", "mlp_norm", "norm_2",
    "post_attention_layernorm", "pre_ff_layernorm",
})  # fmt: skip
"""In front of the MLP; in a layer with post_feedforward_layernorm it has another name, or there is none."""


class HasLayers(Protocol):
    """What sites and hooks ask of a language model."""

    layers: list[nn.Module]
    hidden_dim: int
    name: str
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class SiteKind:
    """One kind of site."""

    order: float
    """When a layer reaches it, relative to the other kinds."""
    find: Callable[[nn.Module], nn.Module | None]
    """Maps a decoder layer to the module whose output is read, or None if it has none, or several."""
    entering: bool = False
    """The rows are what the module takes, not what it returns."""
    shared: bool = False
    """Others read the same tensor: an edit is written into it."""
    projects: bool = False
    """The module is a matrix from rows of another width than the stream's to rows of that width."""


def _only_child(names: frozenset[str]) -> Callable[[nn.Module], nn.Module | None]:
    def find(layer: nn.Module) -> nn.Module | None:
        found = [child for name, child in layer.named_children() if name in names]
        return found[0] if len(found) == 1 else None

    return find


def _behind_norm(norm: str, in_glm: str, names: frozenset[str]) -> Callable[[nn.Module], nn.Module | None]:
    """The child called `norm` (`in_glm` in GLM 4) in layers that normalize what parts add, else the part itself."""

    def find(layer: nn.Module) -> nn.Module | None:
        children = dict(layer.named_children())
        if in_glm in children:
            return children[in_glm]
        return children.get(norm) if "post_feedforward_layernorm" in children else _only_child(names)(layer)

    return find


def _projection(layer: nn.Module) -> nn.Module | None:
    """The output projection of the mixer."""
    mixer = _only_child(_MIXERS)(layer)
    return None if mixer is None else _only_child(_PROJECTIONS)(getattr(mixer, "attention", mixer))


def _behind_mixer(layer: nn.Module) -> nn.Module | None:
    """The first module that reads the stream between mixer and MLP; None where the two read the same stream."""
    children = dict(layer.named_children())
    if getattr(layer, "use_parallel_residual", False) or list(children)[-1] == "ln_2":  # behind the MLP, in GPT 1
        return None
    if "post_feedforward_layernorm" in children:
        return children.get("pre_feedforward_layernorm") or _only_child(_MLPS)(layer)
    return _only_child(_NORMS)(layer)


KINDS: dict[str | None, SiteKind] = {
    "heads": SiteKind(0.5, _projection, entering=True, projects=True),
    "mixer": SiteKind(1, _only_child(_MIXERS)),
    "mixer_out": SiteKind(1.5, _behind_norm("post_attention_layernorm", "post_self_attn_layernorm", _MIXERS)),
    "mid": SiteKind(1.7, _behind_mixer, entering=True, shared=True),
    "mlp_in": SiteKind(1.8, _only_child(_MLPS), entering=True),
    "mlp": SiteKind(2, _only_child(_MLPS)),
    "mlp_out": SiteKind(2.5, _behind_norm("post_feedforward_layernorm", "post_mlp_layernorm", _MLPS)),
    None: SiteKind(3, lambda layer: layer),
}
"""By the last part of a site's name; None is the layer itself, whose output is the residual stream."""


Norm = Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]


def _rms(x_BD: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    size_B1 = x_BD.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    return (x_BD / size_B1).to(x_BD.dtype), lambda y_BD: (y_BD * size_B1).to(x_BD.dtype)


def _zscore(x_BD: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    mean_B1 = x_BD.float().mean(-1, keepdim=True)
    deviation_B1 = (x_BD - mean_B1).std(-1, keepdim=True)
    y_BD = (x_BD - mean_B1) / (deviation_B1 + 1e-5)  # as SAELens has it, and so the way back without
    return y_BD.to(x_BD.dtype), lambda y_BD: (y_BD * deviation_B1 + mean_B1).to(x_BD.dtype)


NORMS: dict[str, Norm] = {"rms": _rms, "zscore": _zscore}
"""Maps rows to themselves normalised one by one, and to the way back."""

DIFFERENCE = "diff"
"""The last part of the name of a site whose rows are those of a second model less those of the first."""

Where = Union["Site", str, int]
"""A site, its name, or the number of the layer after which the residual stream is meant."""


@total_ordering
@dataclass(frozen=True)
class Site:
    """A place in a decoder; sites are ordered as a pass reaches them.

    Raises:
        ModelError: the name is none of a site.
    """

    name: str

    def __post_init__(self) -> None:
        words = self.name.split(".")[2:]
        if not _NAME.fullmatch(self.name) or words != self._words:
            kinds = ", ".join(f"layers.N.{part}" for part in KINDS if part)
            raise ModelError(f"{self.name!r} names no site; write layers.N (the residual stream) or one of {kinds}")

    @property
    def _words(self) -> list[str]:
        return [word for word in (self.part, self.norm, DIFFERENCE if self.is_difference else None) if word]

    @classmethod
    def of(cls, where: Where) -> Site:
        """A site by itself, by its name, or the residual stream after a layer by its number."""
        return where if isinstance(where, Site) else cls(f"layers.{where}" if isinstance(where, int) else where)

    @property
    def layer(self) -> int:
        """Index of the decoder layer that it belongs to."""
        return int(self.name.split(".")[1])

    @property
    def part(self) -> str | None:
        """mixer, mlp or another kind; None for the residual stream after the layer."""
        return next((word for word in self.name.split(".")[2:3] if word in KINDS), None)

    @property
    def norm(self) -> str | None:
        """How its rows are normalised one by one; None for rows as they are."""
        return next((word for word in self.name.split(".")[-1:] if word in NORMS), None)

    @property
    def is_difference(self) -> bool:
        """Whether its rows are of two models; there is nothing to replace in either."""
        return self.name.endswith(f".{DIFFERENCE}")

    @property
    def place(self) -> Site:
        """Where in a single model its rows are read."""
        return Site(self.name.removesuffix(f".{DIFFERENCE}"))

    @property
    def within(self) -> str | None:
        """What its name says behind the layer: mlp, mlp.rms; None for the residual stream as it is."""
        return ".".join(self.name.split(".")[2:]) or None

    def described(self) -> dict[str, Any]:
        """Its entries in an SAE's configuration: `layer`, and `site` unless that is the residual stream."""
        return {"layer": self.layer} | ({"site": self.name} if self.within else {})

    def __lt__(self, other: Site) -> bool:
        return (self.layer, KINDS[self.part].order, self.name) < (other.layer, KINDS[other.part].order, other.name)

    def __str__(self) -> str:
        return self.name


def module_at(lm: HasLayers, site: Site) -> nn.Module:
    """The module whose output, or whose input, is read at `site`.

    Raises:
        ModelError: the layer was not built, or has no such part, or more than one.
    """
    if site.layer >= len(lm.layers):
        raise ModelError(f"layer {site.layer} of {lm.name} was not built; layers 0 to {len(lm.layers) - 1} were")
    layer = lm.layers[site.layer]
    module = KINDS[site.part].find(layer)
    if module is None:
        parts = ", ".join(name for name, _ in layer.named_children())
        raise ModelError(f"{lm.name} has no one {site.part} in layer {site.layer} ({type(layer).__name__} of {parts})")
    return module


def width_at(lm: HasLayers, site: Site) -> int:
    """Values of a row at `site`.

    Raises:
        ModelError: as `module_at`.
    """
    module: Any = module_at(lm, site)
    if not KINDS[site.part].projects:
        return lm.hidden_dim
    return int(getattr(module, "in_features", len(module.weight)))  # the weight of a Conv1D is [in, out]


@torch.no_grad()
def to_stream(lm: HasLayers, site: Site, rows_RD: Tensor) -> Tensor:
    """What rows at `site` add to the residual stream by themselves, [R, width there] -> [R, D]."""
    if not KINDS[site.part].projects:
        return rows_RD
    module, dtype = module_at(lm, site), lm.dtype
    projected: Tensor = module(rows_RD.to(lm.device, dtype)) - module(
        torch.zeros_like(rows_RD[:1]).to(lm.device, dtype)
    )
    return projected.to(rows_RD)


def ends_layer(lm: HasLayers, site: Site) -> bool:
    """Whether `site` is all that later layers see of its layer: the residual stream."""
    return site.norm is None and module_at(lm, site) is lm.layers[site.layer]


def sites_of(recipe: Recipe) -> tuple[Site, ...]:
    """The hooked sites in the order of a pass, each once.

    Raises:
        RecipeError: a hook point's site is none; names its key.
    """
    return tuple(sorted(set(hooked_sites(recipe.hook_points).values())))


def hooked_sites(hook_points: Mapping[str, HookPoint]) -> dict[str, Site]:
    """{hook point: where it reads}.

    Raises:
        RecipeError: a hook point's site is none; names its key.
    """
    return {name: _site(name, "site", point.site) for name, point in hook_points.items()}


def target_sites(hook_points: Mapping[str, HookPoint]) -> dict[str, Site]:
    """{hook point: where the rows are that it reconstructs}: where it reads, but for a transcoder.

    Raises:
        RecipeError: a hook point's target is no site; names its key.
    """
    return {name: _site(name, "target", point.target or point.site) for name, point in hook_points.items()}


def _site(name: str, key: str, where: str) -> Site:
    try:
        return Site(where)
    except ModelError as error:
        raise RecipeError(f"hook_points.{name}.{key}: {error}") from None


def site_names(recipe: Recipe) -> dict[Site, str]:
    """{site: its hook point, or its hook points joined by "and"}, for messages."""
    names: dict[Site, str] = {}
    for name, site in hooked_sites(recipe.hook_points).items():
        names[site] = " and ".join(filter(None, (names.get(site), name)))
    return names


def last_layer(sites: Sequence[Site]) -> int:
    """The last layer that a pass up to all of `sites` needs."""
    return max(site.layer for site in sites)
