"""Measure the device at hand for about ten seconds, so that a plan for it rests on what it does.

Timed are the parts that a run consists of, at the recipe's own shapes: one decoder layer of each kind with random
weights (a run passes each of them many times), one optimiser step of each size of SAE, reading a corpus that is here,
and for comparison with data sheets one large product and one large copy. Nothing is downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import ResourceError
from qwenscope.lm.load import Kind, cut_config, decoder_layers, layer_kinds, load_tokenizer, pick_dtype
from qwenscope.lm.placement import pick_devices
from qwenscope.recipe import Recipe
from qwenscope.sae.topk import TopKSAE
from qwenscope.training.trainer import SAETrainer

DEAD_SHARE = 0.1
"""Share of latents taken for dead while a step is timed: their loss costs, and runs have some."""
_POSITIONS = 8192  # of the batch that the layers are timed on; batches of real conversations hold about 10,000
_SECONDS = 1.0  # per timed part, one repetition at least
_REPEATS = 20


@dataclass(frozen=True)
class Measured:
    """What one device did."""

    device: str
    """Its name, such as cpu or NVIDIA H200."""
    memory_bytes: int
    process_bytes: int
    """What the process holds beside a run's tensors: the interpreter, its libraries and their caches. 0 on a GPU."""
    product_tflops: float
    traffic_tb_s: float
    layer_seconds: Mapping[Kind, float]
    """Per position of a batch, by kind of layer."""
    step_seconds: Mapping[str, float]
    """Per step, by SAE."""
    corpus_seconds: float
    """Of reading the corpus, per token, where that holds up the rest."""

    def lm_seconds(self, kinds: tuple[Kind, ...]) -> float:
        """Of the layers `kinds`, per position of a batch."""
        return sum(self.layer_seconds[kind] for kind in kinds)


def measurable(recipe: Recipe) -> bool:
    """Whether this machine has what `recipe` runs on: a GPU, or the recipe asks for a CPU."""
    return recipe.lm.device == "cpu" or torch.cuda.is_available()


def measure(recipe: Recipe, config: PretrainedConfig) -> Measured:
    """Time the parts of a run of `recipe`, whose language model has `config`, on its `lm.device`.

    Raises:
        ModelError: there is no such device.
        ResourceError: not even single layers and SAEs fit.
    """
    device = pick_devices(recipe.lm.device)[0]
    on_gpu = device.type == "cuda"
    sizes = {(point.dict_size, point.k) for point in recipe.hook_points.values()}
    try:
        layers = _layer_seconds(recipe, config, device)
        steps = {size: _step_seconds(recipe, *size, config.hidden_size, device) for size in sizes}
    except torch.OutOfMemoryError:
        raise ResourceError(
            f"{device} has no room for single layers of {recipe.lm.model}; plan for another card with --gpu NAME"
        ) from None
    return Measured(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        memory_bytes=torch.cuda.mem_get_info(device)[1] if on_gpu else psutil.virtual_memory().total,
        process_bytes=0 if on_gpu else psutil.Process().memory_info().rss,
        product_tflops=product_tflops(device, pick_dtype(recipe.lm, config)),
        traffic_tb_s=_traffic_tb_s(device),
        layer_seconds=layers,
        step_seconds={name: steps[point.dict_size, point.k] for name, point in recipe.hook_points.items()},
        corpus_seconds=_corpus_seconds(recipe),
    )


def product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of one large square product, in 10^12 FLOPs per second."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / _seconds(lambda: a @ a, device) / 1e12


def _traffic_tb_s(device: torch.device) -> float:
    """Bytes read and written by one large copy, in 10^12 per second."""
    source = torch.zeros(1 << (28 if device.type == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device) / 1e12


@torch.no_grad()
def _layer_seconds(recipe: Recipe, config: PretrainedConfig, device: torch.device) -> dict[Kind, float]:
    """Per position of each kind of layer, in the shallowest model that has them all."""
    kinds = layer_kinds(config)[: recipe.layers[-1] + 1]
    depth = 1 + max(kinds.index(kind) for kind in set(kinds))
    with device:
        model: Any = AutoModel.from_config(  # type: ignore[no-untyped-call]
            cut_config(config, depth), dtype=pick_dtype(recipe.lm, config)
        )
    model.train(False)
    length = min(recipe.corpus.max_length, 1024)
    ids_CT = torch.randint(config.vocab_size, (max(1, _POSITIONS // length), length), device=device)
    times: dict[Kind, list[float]] = {kind: [] for kind in kinds}

    def watch(layer: nn.Module, kind: Kind) -> None:
        began = 0.0

        def before(_module: nn.Module, _inputs: Any) -> None:
            nonlocal began
            began = _now(device)

        def after(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            times[kind].append(_now(device) - began)

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    for layer, kind in zip(decoder_layers(model, depth), kinds, strict=False):
        watch(layer, kind)
    model(input_ids=ids_CT, use_cache=False)  # kernels are compiled and caches filled
    for taken in times.values():
        taken.clear()
    _seconds(lambda: model(input_ids=ids_CT, use_cache=False), device)
    return {kind: min(taken) / ids_CT.numel() for kind, taken in times.items()}


def _step_seconds(recipe: Recipe, dict_size: int, k: int, hidden: int, device: torch.device) -> float:
    """Of one trainer's step on random rows, a share of its latents dead."""
    training = recipe.training
    trainer = SAETrainer(
        TopKSAE(hidden, dict_size, k, seed=0).to(device),
        1e-6,
        aux_coefficient=training.aux_coefficient,
        aux_k=training.aux_k,
        normalise=training.normalise,
        precision=training.precision,
        clip_norm=training.clip_norm,
        moments=getattr(torch, training.moments),
    )
    dead = slice(0, int(DEAD_SHARE * dict_size))
    trainer.weights["encoder_bias"][dead] = -1e3  # out of reach: they stay dead
    trainer.ages.tokens_N[dead] = trainer.ages.dead_after_tokens
    rows_BD = torch.randn(training.batch_size, hidden, device=device)
    return _seconds(lambda: trainer.step(rows_BD), device)


def _corpus_seconds(recipe: Recipe) -> float:
    """Per token, of sources on this machine; 0 where they are elsewhere, or other processes read ahead."""
    generated_or_local = all(
        source.path or (source.name == "tool_use" and not source.repo) for source in recipe.corpus.sources
    )
    if recipe.corpus.workers or not generated_or_local:
        return 0.0
    stream = CorpusStream(recipe.corpus, load_tokenizer(recipe.lm), seed=recipe.seed)
    next(stream, None)  # opens what it reads from
    tokens, began = 0, time.perf_counter()
    while time.perf_counter() - began < _SECONDS and (conversation := next(stream, None)) is not None:
        tokens += len(conversation.token_ids)
    seconds = time.perf_counter() - began
    stream.close()
    return seconds / tokens if tokens else 0.0


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Least wall time of a call after one to warm up: neighbours on a machine only ever slow it down."""
    call()
    times: list[float] = []
    while not times or (sum(times) < _SECONDS and len(times) < _REPEATS):
        began = _now(device)
        call()
        times.append(_now(device) - began)
    return min(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
