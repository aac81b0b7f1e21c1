"""Load a Hugging Face causal language model, or only the part of it that SAEs need.

The published subject is a multimodal 40-layer checkpoint; its SAEs read layers 6 to 35. Building layers 0..35 without
vision tower, MTP and LM head saves a fifth of the memory and a quarter of the FLOPs, and the bytes of the other tensors
are never read (nor, from the Hub, their shards downloaded). transformers does the naming and the conversion of expert
tensors: it is handed lazy slices of the shards and materialises those that its cut model has a place for.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from qwenscope.errors import ModelError, ResourceError, reason
from qwenscope.lm.forward import residual_streams
from qwenscope.lm.placement import device_map, pick_devices
from qwenscope.recipe import HookPoint, LMRecipe

logger = logging.getLogger(__name__)

_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"]  # config, tokenizer, shard index
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_NEVER = re.compile(r"(?:^|\.)(?:mtp|visual|vision_\w+|vision|audio_\w+|multi_modal_projector|embed_vision)\.")
_LM_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")
Kind = str | None


@dataclass(eq=False)
class LanguageModel:
    """A loaded model and what the other rooms ask about it."""

    model: PreTrainedModel
    """Transformers model in eval mode whose parameters need no gradient; without LM head unless it was asked for."""
    tokenizer: Tokenizer
    layers: list[nn.Module]
    """The decoder layers that were built, 0 .. last."""
    layer_kinds: tuple[Kind, ...]
    """Kind of every layer of the config, built or not: deltanet, attention, or None where the config names none."""
    hidden_dim: int
    device: torch.device
    """Where token ids go in and residual streams come out; the first of several."""
    dtype: torch.dtype
    name: str
    """Hub id or folder, as the recipe gave it."""
    revision: str | None
    """Commit of a Hub model; None for a folder."""

    @property
    def decoder(self) -> nn.Module:
        """Embedding, layers and final norm, in all families the same call: input_ids -> last_hidden_state."""
        decoder: nn.Module = self.model.get_decoder()  # type: ignore[no-untyped-call]
        return decoder

    @property
    def truncated(self) -> bool:
        """Whether layers of the config were left unbuilt, so that there are no logits."""
        return len(self.layers) < len(self.layer_kinds)

    def streams(
        self, input_ids_CT: torch.Tensor, lengths_C: Sequence[int], layers: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """`residual_streams`, which needs no lengths: padding reaches no token."""
        return residual_streams(self, input_ids_CT, layers)

    def digest(self, last_layer: int) -> str:
        """16 hex digits that tell models apart: 64 evenly spaced values of every parameter up to `last_layer`."""
        digest = hashlib.sha256()
        parts: list[Any] = [self.model.get_input_embeddings(), *self.layers[: last_layer + 1]]
        for name, parameter in (named for part in parts for named in part.named_parameters()):
            values = parameter.detach().flatten()
            sample = values[:: max(1, len(values) // 64)][:64].float().cpu()
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:16]


def load_language_model(lm: LMRecipe, *, last_layer: int | None = None, lm_head: bool = False) -> LanguageModel:
    """Load a model for inference.

    Args:
        lm: Which model, revision, dtype and device.
        last_layer: Build layers 0..last_layer and read only their tensors; None builds all.
        lm_head: Also build the LM head. On a truncated model it serves the unembedding only: there are no logits.

    Raises:
        ModelError: no such model, damaged or missing shards, tensors that do not fit, a layer that does not exist, or
            an architecture that would need code from the Hub.
        ResourceError: not enough memory.
    """
    folder, revision = resolve(lm)
    config = _text_config(lm.model, folder)
    kinds = layer_kinds(config)
    last = len(kinds) - 1 if last_layer is None else last_layer
    if not 0 <= last < len(kinds):
        raise ModelError(f"{lm.model} has layers 0 to {len(kinds) - 1}; there is no layer {last}")
    cut = cut_config(config, last + 1)
    devices = pick_devices(lm.device)
    head = lm_head and not cut.tie_word_embeddings
    with _model_errors(lm.model):
        slices = _open_slices(lm, folder, revision, last, head)
        dtype = pick_dtype(lm, config)
        model = _build(cut, slices, dtype, devices, lm_head)
        if lm_head and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = _tokenizer(lm.model, folder)
    model.requires_grad_(False)
    model.train(False)
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        layers=decoder_layers(model, last + 1),
        layer_kinds=kinds,
        hidden_dim=config.hidden_size,
        device=devices[0],
        dtype=dtype,
        name=lm.model,
        revision=revision,
    )


def load_config(lm: LMRecipe) -> PretrainedConfig:
    """The language model's text config alone: enough for `layer_kinds`, sizes and plans; reads no weights.

    Raises:
        ModelError: no such model, or an architecture that transformers does not know.
    """
    folder, _ = resolve(lm)
    return _text_config(lm.model, folder)


def load_tokenizer(lm: LMRecipe) -> Tokenizer:
    """The language model's tokenizer alone; reads no weights.

    Raises:
        ModelError: no such model, or no tokenizer beside it that transformers reads without code of the checkpoint's.
    """
    folder, _ = resolve(lm)
    return _tokenizer(lm.model, folder)


def _tokenizer(name: str, folder: Path) -> Tokenizer:
    """Never asks for, nor runs, code of the checkpoint; truncation and padding that it was saved with are off."""
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises Exception itself, transformers whatever a foreign file leads to
        raise ModelError(f"the tokenizer of {name} cannot be loaded: {reason(error)}") from error
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def layer_kinds(config: PretrainedConfig) -> tuple[Kind, ...]:
    """Kind of each decoder layer: deltanet, attention, another name the config uses, or None where it names none."""
    types = getattr(config, "layer_types", None)
    if types is None:
        return (None,) * int(config.num_hidden_layers)
    gated_delta = hasattr(config, "linear_key_head_dim")  # other families call other mixers linear_attention
    names = {"linear_attention": "deltanet"} if gated_delta else {}
    names |= {"full_attention": "attention", "sliding_attention": "attention", "chunked_attention": "attention"}
    return tuple(names.get(kind, kind) for kind in types)


def check_hook_points(lm_or_kinds: LanguageModel | Sequence[Kind], hook_points: Mapping[str, HookPoint]) -> None:
    """Refuse hook points that the model does not have.

    Raises:
        ModelError: a layer beyond the last one, or of another kind than the recipe says; names the hook point.
    """
    kinds = lm_or_kinds.layer_kinds if isinstance(lm_or_kinds, LanguageModel) else lm_or_kinds
    for name, point in hook_points.items():
        if point.layer >= len(kinds):
            raise ModelError(f"hook_points.{name}.layer is {point.layer}; the model has layers 0 to {len(kinds) - 1}")
        actual = kinds[point.layer]
        if point.kind is not None and actual is None:
            raise ModelError(
                f"hook_points.{name}.kind is {point.kind}; this model's layers have no kinds, set it to null"
            )
        if point.kind is not None and point.kind != actual:
            raise ModelError(f"hook_points.{name}.kind is {point.kind}; layer {point.layer} is of kind {actual}")


def resolve(lm: LMRecipe) -> tuple[Path, str | None]:
    """Folder with config, tokenizer and (for local models) weights, and the commit of a Hub model."""
    if lm.model == "standin":
        from qwenscope.lm.standin import STANDIN_FOLDER  # here: its training script imports this module

        return STANDIN_FOLDER, None
    folder = Path(lm.model)
    if folder.is_dir():
        return folder, None
    with _hub_errors(lm):
        snapshot = Path(snapshot_download(lm.model, revision=lm.revision, allow_patterns=_SMALL_FILES))
    return snapshot, snapshot.name


def _text_config(name: str, folder: Path) -> PretrainedConfig:
    with _model_errors(name):
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config: PretrainedConfig = whole.get_text_config(decoder=True)
    if config is not whole and hasattr(whole, "quantization_config"):
        config.quantization_config = whole.quantization_config
    return config


def cut_config(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A config of the first `layers` layers: every per-layer list is cut alike."""
    cut = copy.deepcopy(config)
    whole = config.num_hidden_layers
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == whole and whole > layers:
            setattr(cut, key, value[:layers])
    cut.num_hidden_layers = layers
    return cut


def pick_dtype(lm: LMRecipe, config: PretrainedConfig) -> torch.dtype:
    """The dtype for a recipe's `lm.dtype`; auto is the checkpoint's own."""
    if lm.dtype != "auto":
        return torch.float32 if lm.dtype == "float32" else torch.bfloat16
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _needed(key: str, last_layer: int, lm_head: bool) -> bool:
    layer = _LAYER.search(key)
    if _NEVER.search(key) or (layer and int(layer[1]) > last_layer):
        return False
    return lm_head or not _LM_HEAD.search(key)


def _shards(folder: Path, last_layer: int, lm_head: bool) -> list[str]:
    """Names of the weights files that hold a needed tensor."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        shards = sorted({Path(file).name for key, file in weight_map if _needed(key, last_layer, lm_head)})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is no index of weights files; fetch it again") from None
    return shards


def _open_slices(
    lm: LMRecipe, folder: Path, revision: str | None, last_layer: int, lm_head: bool
) -> dict[str, Any]:  # safetensors' slice class is private to its extension
    """Lazy slices of the needed tensors by checkpoint key; opens (and from the Hub fetches) only the needed shards."""
    shards = _shards(folder, last_layer, lm_head)
    if revision is not None:
        with _hub_errors(lm):
            snapshot_download(lm.model, revision=revision, allow_patterns=shards)
    slices: dict[str, Any] = {}
    for shard in shards:
        path = folder / shard
        if not path.is_file():
            raise ModelError(f"{lm.model} lacks the weights file {shard}; only safetensors checkpoints are read")
        try:
            file: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ModelError(f"{path} is damaged ({error}); fetch it again") from None
        slices |= {key: file.get_slice(key) for key in file.keys() if _needed(key, last_layer, lm_head)}  # noqa: SIM118
    logger.info("reading %d tensors of %s from %d files", len(slices), lm.model, len(shards))
    return slices


def _build(
    config: PretrainedConfig, slices: dict[str, Any], dtype: torch.dtype, devices: list[torch.device], lm_head: bool
) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM if lm_head else AutoModel
    with torch.device("meta"):  # shapes only: transformers' own choice of class, for any family
        shapes: Any = auto.from_config(config)
    places: Any = {"": devices[0]}
    if len(devices) > 1:
        places = device_map(shapes, decoder_layers(shapes, config.num_hidden_layers), devices)
    elif devices[0].type == "cpu" or find_spec("accelerate") is None:
        places = None  # by way of host memory
    with _quiet_transformers():
        model, report = type(shapes).from_pretrained(
            None, config=config, state_dict=slices, dtype=dtype, device_map=places, output_loading_info=True
        )
    if report["missing_keys"]:
        raise ModelError(
            f"{sorted(report['missing_keys'])[0]} is missing from the weights; the checkpoint is incomplete"
        )
    placed: PreTrainedModel = model if len(devices) > 1 else model.to(devices[0])
    for parameter in placed.parameters():
        if parameter.data_ptr() % 64:  # a view of the mapped file: unaligned (the last bits of CPU products depend on
            parameter.data = parameter.data.clone()  # alignment), and at the mercy of whoever writes that file
    return placed


def decoder_layers(model: Any, count: int) -> list[nn.Module]:
    """The `count` layers of a transformers model of any supported family.

    Raises:
        ModelError: it keeps them under no list of that length.
    """
    decoder = model.get_decoder()
    for module in decoder.children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ModelError(f"{type(decoder).__name__} has no list of {count} decoder layers; this family is not supported")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No load report and no bar of its own: what is skipped here is skipped on purpose, what is missing is an error."""
    log: Any = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


@contextmanager
def _model_errors(name: str) -> Iterator[None]:
    """Turn what transformers and safetensors raise for a bad checkpoint into one line."""
    try:
        yield
    except ModelError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(f"not enough memory for {name}: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{name} cannot be loaded: {_first_line(error)}") from error


@contextmanager
def _hub_errors(lm: LMRecipe) -> Iterator[None]:
    try:
        yield
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        where = lm.model if lm.revision is None else f"{lm.model} at {lm.revision}"
        raise ModelError(
            f"lm.model {where} is neither a folder nor to be had from the Hub: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
