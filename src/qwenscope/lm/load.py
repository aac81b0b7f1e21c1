"""Load a Hugging Face causal language model, or only the part of it that SAEs need.

The published subject is a multimodal 40-layer checkpoint; its SAEs read layers 6 to 35. Building layers 0..35 without
vision tower, MTP and LM head saves a fifth of the memory and a quarter of the FLOPs, and the bytes of the other tensors
are never read (nor, from the Hub, their shards downloaded). transformers does the naming and the conversion of expert
tensors: it is handed lazy slices of the shards and materialises those that its cut model has a place for.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from qwenscope.errors import ModelError, QwenscopeError, ResourceError, reason
from qwenscope.lm.checks import check_looks_back, check_second, check_tokenizer
from qwenscope.lm.gguf import checked_revision, is_gguf, where
from qwenscope.lm.gguf import tensors as gguf_tensors
from qwenscope.lm.model import (
    Kind,
    LanguageModel,
    as_language_model,
    config_number,
    cut_config,
    decoder_layers,
    kind_of,
)
from qwenscope.lm.placement import device_map, pick_devices
from qwenscope.lm.sites import hooked_sites, module_at, target_sites, width_at
from qwenscope.lm.tokenizer import read_tokenizer
from qwenscope.recipe import HookPoint, LMRecipe

logger = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)
"""Compute capability from which on GPUs multiply FP8 weights as they are."""
_KINDS: dict[str, tuple[Kind, ...]] = {}  # of configs seen: building the shapes of a large model takes a second
_MOST_PARTS = 10_000  # each becomes a module
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"]  # config, tokenizer, shard index
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_NEVER = re.compile(r"(?:^|\.)(?:mtp|visual|vision_\w+|vision|audio_\w+|multi_modal_projector|embed_vision)\.")
_LM_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")


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
    if devices[0].type == "cuda":
        check_eight_bits(lm.model, config, torch.cuda.get_device_capability(devices[0]))
    with _model_errors(lm.model):
        # Tied weights may stand in the checkpoint under either name, or under both with a head of its own.
        head = lm_head or bool(cut.tie_word_embeddings)
        if is_gguf(folder):
            with _quiet_transformers():
                whole = gguf_tensors(folder, pick_dtype(lm, config))
            slices = {key: tensor for key, tensor in whole.items() if _needed(key, last, head)}
        else:
            slices = _open_slices(lm, folder, revision, last, head)
        model = _build(cut, slices, pick_dtype(lm, config), devices, lm_head)
        if lm_head and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = read_tokenizer(lm.model, folder)
    model.requires_grad_(False)
    model.train(False)
    loaded = as_language_model(model, tokenizer)
    loaded = replace(loaded, layer_kinds=kinds, device=devices[0], name=lm.model, revision=revision)
    check_tokenizer(loaded)
    with _model_errors(lm.model):
        check_looks_back(loaded)
    if lm.second is not None:
        loaded.second = load_language_model(lm.second, last_layer=last_layer)
        check_second(loaded, loaded.second)
    return loaded


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
    return read_tokenizer(lm.model, folder)


def layer_kinds(config: PretrainedConfig) -> tuple[Kind, ...]:
    """`kind_of` each decoder layer of a text config, from a model without weights (on the meta device)."""
    key = config.to_json_string(use_diff=False)
    if key not in _KINDS:
        with torch.device("meta"):
            shapes: Any = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        _KINDS[key] = tuple(map(kind_of, decoder_layers(shapes, config.num_hidden_layers)))
    return _KINDS[key]


def check_eight_bits(name: str, config: PretrainedConfig, capability: tuple[int, int]) -> None:
    """Refuse an FP8 checkpoint that would load on a GPU and then find no products; older GPUs multiply it out.

    Raises:
        ModelError: the package that fetches those products is not installed.
    """
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if method == "fp8" and capability >= FP8_CAPABILITY and find_spec("kernels") is None:
        raise ModelError(
            f"{name} is in FP8, and transformers fetches FP8 products from the Hub when it runs: pip install kernels "
            "and run it once online, or take the checkpoint in bfloat16"
        )


def check_hook_points(lm_or_kinds: LanguageModel | Sequence[Kind], hook_points: Mapping[str, HookPoint]) -> None:
    """Refuse hook points that the model does not have.

    Raises:
        ModelError: a layer beyond the last one, of another kind than the recipe says, or without the part that a site
            names; RecipeError: a site's name is none. Both name the hook point.
    """
    lm = lm_or_kinds if isinstance(lm_or_kinds, LanguageModel) else None
    kinds = lm_or_kinds.layer_kinds if isinstance(lm_or_kinds, LanguageModel) else lm_or_kinds
    sites, targets = hooked_sites(hook_points), target_sites(hook_points)
    for name, point in hook_points.items():
        if point.layer >= len(kinds):
            raise ModelError(f"hook_points.{name}.layer is {point.layer}; the model has layers 0 to {len(kinds) - 1}")
        for key, site in (("site", sites[name]), ("target", targets[name])):
            if lm is not None and site.layer < len(lm.layers):
                try:
                    module_at(lm, site.place)
                    if site.is_difference and lm.second is not None and width_at(lm, site) != width_at(lm.second, site):
                        raise ModelError(f"{lm.second.name} is {width_at(lm.second, site)} wide there")
                except ModelError as error:
                    raise ModelError(f"hook_points.{name}.{key}: {error}") from None
        actual = kinds[point.layer]
        if point.kind is not None and actual is None:
            raise ModelError(
                f"hook_points.{name}.kind is {point.kind}; this model's layers have no kinds, set it to null"
            )
        if point.kind is not None and point.kind != actual:
            raise ModelError(f"hook_points.{name}.kind is {point.kind}; layer {point.layer} is of kind {actual}")


def resolve(lm: LMRecipe) -> tuple[Path, str | None]:
    """Folder with config, tokenizer and (for local models) weights, or a GGUF file with all of them; and the commit of
    a Hub model, or the digest of that file."""
    if lm.model == "standin":
        from qwenscope.lm.standin import STANDIN_FOLDER  # here: its training script imports this module

        return STANDIN_FOLDER, None
    folder = Path(lm.model)
    if folder.is_dir():
        return folder, None
    if is_gguf(folder):
        return folder, checked_revision(folder, lm.revision)
    with _hub_errors(lm):
        snapshot = Path(snapshot_download(lm.model, revision=lm.revision, allow_patterns=_SMALL_FILES))
    return snapshot, snapshot.name


def _text_config(name: str, folder: Path) -> PretrainedConfig:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{name} holds an adapter (adapter_config.json), which is not applied here: merge it into the weights "
            "(peft's merge_and_unload) and save those in a folder of their own"
        )
    with _model_errors(name):
        whole = AutoConfig.from_pretrained(**where(folder), trust_remote_code=False)
    config: PretrainedConfig = whole.get_text_config(decoder=True)
    config.return_dict = True  # or the model's outputs are tuples
    if getattr(whole, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder ({whole.model_type}), not supported; take a causal decoder")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(f"{name} is no causal language model ({whole.model_type}), which is not supported")
    if config is not whole and hasattr(whole, "quantization_config"):
        config.quantization_config = whole.quantization_config
    parts = max(config_number(config, key) for key in ("num_hidden_layers", "num_experts", "num_local_experts"))
    if parts > _MOST_PARTS:
        raise ModelError(f"the config of {name} speaks of {parts:,} layers or experts; it is damaged, fetch it again")
    with _model_errors(name):
        layer_kinds(config)  # a model can be made of its numbers
    return config


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
    _check_amount(shapes, slices)
    places: Any = {"": devices[0]}
    if len(devices) > 1:
        places = device_map(shapes, decoder_layers(shapes, config.num_hidden_layers), devices)
    elif devices[0].type == "cpu" or find_spec("accelerate") is None:
        places = None  # by way of host memory
    with _quiet_transformers():
        model, report = type(shapes).from_pretrained(
            None,
            config=config,
            state_dict=slices,
            dtype=dtype,
            device_map=places,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused here, by name
        )
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"{key} is of shape {list(found)} in the weights and of {list(wanted)} by the config; fetch both again"
        )
    if report["missing_keys"] and config.tie_word_embeddings and not lm_head:
        return _build(config, slices, dtype, devices, True)  # the embedding may stand under the head's name
    if report["missing_keys"]:
        raise ModelError(
            f"{sorted(report['missing_keys'])[0]} is missing from the weights; the checkpoint is incomplete"
        )
    placed: PreTrainedModel = model if len(devices) > 1 else model.to(devices[0])
    for parameter in placed.parameters():
        if parameter.data_ptr() % 64:  # a view of the mapped file: unaligned (the last bits of CPU products depend on
            parameter.data = parameter.data.clone()  # alignment), and at the mercy of whoever writes that file
    return placed


def _check_amount(shapes: PreTrainedModel, slices: dict[str, Any]) -> None:
    """Refuse, before any memory is taken, sizes far beyond what the weights hold; a packed weight is eight at most."""
    wanted = sum(parameter.numel() for parameter in shapes.parameters())
    stored = sum(math.prod(getattr(tensor, "shape", None) or tensor.get_shape()) for tensor in slices.values())
    if wanted > max(2**28, 16 * stored):
        raise ModelError(f"the config speaks of {wanted:,} weights, {stored:,} are there; it lacks sizes or is damaged")


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
    except QwenscopeError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(f"not enough memory for {name}: {reason(error)}") from error
    except Exception as error:  # whatever a foreign file leads to
        raise ModelError(f"{name} cannot be loaded: {reason(error)}") from error


@contextmanager
def _hub_errors(lm: LMRecipe) -> Iterator[None]:
    try:
        yield
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        where = lm.model if lm.revision is None else f"{lm.model} at {lm.revision}"
        raise ModelError(f"lm.model {where} is neither a folder nor to be had from the Hub: {reason(error)}") from error
