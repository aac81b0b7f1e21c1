"""What the parts of a recipe are made of, strict nodes and bounded numbers; and its hook points."""

from __future__ import annotations

import importlib
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

_SITE = re.compile(r"layers\.(0|[1-9]\d{0,5})(?:\.|$)")
MOST = 10**15  # of anything that is counted

Role = Literal["system", "user", "assistant", "tool_call", "tool_result", "think", "template", "text"]
"""What a token of a conversation belongs to."""

Positive = Annotated[int, Field(gt=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Share = Annotated[float, Field(ge=0, le=1)]


class Node(BaseModel):
    """A part of the recipe: frozen, strict about keys, each field documented by the string under it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    texts: ClassVar[tuple[str, ...]] = ()
    """Keys whose values may have several lines."""

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, given: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1, and YAML takes yes and on for true; no name or path holds control characters."""
        if isinstance(given, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false stand for no value here")
        if isinstance(given, str) and not given.isprintable() and info.field_name not in cls.texts:
            raise ValueError("holds a character that cannot be shown")
        return given


class HookPoint(Node):
    """Where one SAE reads, and that SAE's size."""

    layer: Annotated[int, Field(ge=0, lt=1_000_000)]
    """Index of the decoder layer after which the residual stream is read; short for the site layers.N."""
    site: str
    """Where in the model, instead of layer: layers.22 (the residual stream after layer 22), layers.22.mlp (what its MLP
    or mixture of experts returns) or layers.22.mixer (what its attention or DeltaNet returns); layers.22.mlp_out and
    layers.22.mixer_out are what these add to the stream, behind a norm that some families put there; layers.22.heads
    is what the mixer hands to its output projection, layers.22.mid the stream between mixer and MLP, layers.22.mlp_in
    what the MLP reads."""
    target: str | None = None
    """The site whose rows a transcoder predicts; of imported SAEs only, for none is trained."""
    kind: Literal["deltanet", "attention"] | None = None
    """Kind the layer must have; null for models without kinds."""
    dict_size: Annotated[int, Field(gt=0, lt=1 << 31)]
    """Number of latents."""
    k: Positive
    """Latents active per token; on average, under batch_topk."""
    lr: Annotated[float, Field(gt=0, le=1)]
    """Peak learning rate."""
    activation: str = "topk"
    """Which latents are active: topk, the k largest of each token; batch_topk, the k largest per token of the whole
    batch together, and afterwards those above a threshold that training estimates."""

    @model_validator(mode="before")
    @classmethod
    def _layer_or_site(cls, given: Any) -> Any:
        """Either key says where; both attributes are filled."""
        if not isinstance(given, dict):
            return given
        if ("layer" in given) == ("site" in given):
            raise ValueError("give one of the keys layer and site" + (", not both" if "layer" in given else ""))
        if "layer" in given:
            layer = given["layer"]
            if isinstance(layer, str) and not re.fullmatch("0|[1-9][0-9]{0,5}", layer):
                raise ValueError(f"layer {layer!r} is no layer's number")
            return {**given, "site": f"layers.{str(layer).removesuffix('.0')}"}
        found = _SITE.match(str(given["site"]))
        if found is None:
            raise ValueError(
                f"site {given['site']!r} names no place; write layers.22, layers.22.mlp or layers.22.mixer"
            )
        return {**given, "layer": int(found[1])}

    @model_serializer(mode="wrap")
    def _as_written(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """With `layer` alone for the residual stream, with `site` alone for others; `target` where there is one."""
        tree: dict[str, Any] = serialise(self)
        if self.target is None:
            del tree["target"]
        del tree["site" if self.site == f"layers.{self.layer}" else "layer"]
        return tree

    @model_validator(mode="after")
    def _k_fits(self) -> HookPoint:
        if self.k > self.dict_size:
            raise ValueError(f"k {self.k} exceeds dict_size {self.dict_size}")
        return self


def file_systems() -> Any:
    """fsspec's registry: takes 0.2 s to import, and is rarely needed."""
    return importlib.import_module("fsspec.registry")


def schemes_of(address: str) -> list[str]:
    """The file systems that an fsspec address passes through: simplecache and s3 of simplecache::s3://bucket."""
    return re.findall(r"(?:^|::)([^:/]*)(?=://|::)", address)
