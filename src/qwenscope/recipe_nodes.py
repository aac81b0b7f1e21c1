"""What the parts of a recipe are made of, strict nodes and bounded numbers; its language model and its hook points."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
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

from qwenscope.files import public_name

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


class LMRecipe(Node):
    """Which language model, and how it is loaded."""

    model: str
    """Hub id, folder, GGUF file, or `standin` for the packaged stand-in."""
    revision: str | None = None
    """Commit or tag on the Hub; resolved once and recorded in the run."""
    model_b: str | None = None
    """Another model of the same tokenizer and shape, such as the instruct model of a base; sites such as layers.22.diff
    read its rows less those of model."""
    revision_b: str | None = None
    """Its commit or tag on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward pass; auto takes the checkpoint's."""
    device: str = "auto"
    """auto (CUDA when present, else CPU), a torch device such as cpu or cuda:1, or several that share the layers, as
    cuda:0,cuda:1."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """Who computes the rows that a run trains on; vllm only after a comparison with transformers. Evaluation, index and
    steering are transformers' in any case."""

    @model_validator(mode="after")
    def _vllm_takes_one_device_and_model(self) -> LMRecipe:
        if self.backend == "vllm" and self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(
                f"backend vllm runs on one device of its own choice; set device to auto, not {self.device} "
                "(CUDA_VISIBLE_DEVICES picks a GPU)"
            )
        if self.backend == "vllm" and self.model_b is not None:
            raise ValueError("backend vllm runs one model; leave model_b out, or set backend to transformers")
        return self

    @property
    def second(self) -> LMRecipe | None:
        """How `model_b` is loaded: as `model` is."""
        if self.model_b is None:
            return None
        return self.model_copy(
            update={"model": self.model_b, "revision": self.revision_b, "model_b": None, "revision_b": None}
        )

    def pinned(self, revisions: Mapping[str, Any]) -> LMRecipe:
        """At the commits that a run resolved and recorded under `model` and `model_b`."""
        resolved = {"revision": revisions.get("model"), "revision_b": revisions.get("model_b")}
        return self.model_copy(update={key: commit for key, commit in resolved.items() if commit is not None})

    def published(self) -> LMRecipe:
        """Folders by their last part."""
        names = {key: public_name(name) for key in ("model", "model_b") if (name := getattr(self, key)) is not None}
        return self.model_copy(update=names)

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The keys of a second model only where there is one: recipes without stay what they were."""
        tree: dict[str, Any] = serialise(self)
        return {key: value for key, value in tree.items() if value is not None or not key.endswith("_b")}


class HookPoint(Node):
    """Where one SAE reads, and that SAE's size."""

    layer: Annotated[int, Field(ge=0, lt=1_000_000)]
    """Index of the decoder layer after which the residual stream is read; short for the site layers.N."""
    site: str
    """Where in the model, instead of layer: layers.22 (the residual stream after layer 22), layers.22.mlp (what its MLP
    or mixture of experts returns) or layers.22.mixer (what its attention or DeltaNet returns); layers.22.mlp_out and
    layers.22.mixer_out are what these add to the stream, behind a norm that some families put there; layers.22.heads
    is what the mixer hands to its output projection, layers.22.mid the stream between mixer and MLP, layers.22.mlp_in
    what the MLP reads. A last .diff, as layers.22.diff, takes the rows of lm.model_b less those of lm.model there."""
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

    @property
    def is_difference(self) -> bool:
        """Whether rows of two models are read."""
        return self.site.endswith(".diff")

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
        if self.target is not None and (self.is_difference or self.target.endswith(".diff")):
            raise ValueError("a difference of two models is no transcoder's: leave target out")
        return self


def file_systems() -> Any:
    """fsspec's registry: takes 0.2 s to import, and is rarely needed."""
    return importlib.import_module("fsspec.registry")


def schemes_of(address: str) -> list[str]:
    """The file systems that an fsspec address passes through: simplecache and s3 of simplecache::s3://bucket."""
    return re.findall(r"(?:^|::)([^:/]*)(?=://|::)", address)
