"""Measure the device at hand for about ten seconds, so that a plan for it rests on what it does.

Timed are the parts that a run consists of, at the recipe's own shapes: reading a corpus that is here, one decoder layer
of each kind with random weights on a batch like the run's own (a run passes each of them many times), calibrating each
size of SAE and one optimizer step of it, and for comparison with data sheets one large product and one large copy.
Nothing is downloaded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from qwenscope.corpus.stream import CorpusStream
from qwenscope.costs import Range
from qwenscope.errors import ResourceError
from qwenscope.lm.batches import cut
from qwenscope.lm.load import layer_kinds, load_tokenizer, pick_dtype
from qwenscope.lm.model import Kind, cut_config, decoder_layers
from qwenscope.lm.placement import pick_devices
from qwenscope.machine import KERNELS, import_error
from qwenscope.recipe import HookPoint, Recipe
from qwenscope.sae.sae import SAE
from qwenscope.training.trainer import SAETrainer

DEAD_SHARE = 0.06
"""Of latents, at the cautious end of a step's time: what the dead-latent loss leaves at 32 latents per dimension."""
_MEDIAN, _SPREAD, _LEAST = 550, 0.8, 16
"""Tokens of conversations that nobody has looked at: log-normal, at least so many."""
_SECONDS = 1.0  # per timed part, two repetitions at least
_REPEATS = 20


@dataclass(frozen=True)
class Batches:
    """The language-model batches of one window."""

    count: int
    shape: tuple[int, int]
    """(C, T) of one that is neither large nor small."""
    padding: float
    """Positions per token."""


@dataclass(frozen=True)
class Measured:
    """What one device did."""

    device: str
    """Its name, such as cpu or NVIDIA H200."""
    capability: tuple[int, int]
    """A GPU's compute capability; (0, 0) of a CPU."""
    fused_mixer: bool
    """Whether Gated DeltaNet runs by kernels of its own."""
    lanes: int
    """How many processes or threads of work run beside each other without slowing down: 1 on a GPU."""
    memory_bytes: int
    process_bytes: int
    """What the process holds beside a run's tensors: the interpreter, its libraries and their caches. 0 on a GPU."""
    product_tflops: float
    traffic_tb_s: float
    batches: Batches
    layer_seconds: Mapping[Kind, float]
    """Per position of a batch, by kind of layer."""
    rest_seconds: float
    """Per position of a batch, of all that is no layer."""
    step_seconds: Mapping[str, Range]
    """Per step, by SAE: with a share of dead latents, and with none."""
    calibration_seconds: Mapping[str, float]
    """Per row that an SAE is calibrated on."""
    corpus_seconds: float
    """Of reading the corpus, per token, where that holds up the rest."""

    def lm_seconds(self, kinds: tuple[Kind, ...]) -> float:
        """Of the layers `kinds` and all around them, per position of a batch."""
        return self.rest_seconds + sum(self.layer_seconds[kind] for kind in kinds)


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
    sizes = {_size(point) for point in recipe.hook_points.values()}
    lengths, corpus_seconds = _conversations(recipe)
    batches = batches_of(recipe, device, lengths)
    try:
        layers, rest = _layer_seconds(recipe, config, batches.shape, device)
        steps = {size: _step_seconds(recipe, size, config.hidden_size, device) for size in sizes}
    except torch.OutOfMemoryError:
        raise ResourceError(
            f"{device} has no room for single layers of {recipe.lm.model}; plan for another card with --gpu NAME"
        ) from None
    by_sae = {name: steps[_size(point)] for name, point in recipe.hook_points.items()}
    return Measured(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        capability=torch.cuda.get_device_capability(device) if on_gpu else (0, 0),
        fused_mixer=on_gpu and import_error(KERNELS["fla"]) is None,
        lanes=1 if on_gpu else max(1, (psutil.cpu_count() or 1) // torch.get_num_threads()),
        memory_bytes=torch.cuda.mem_get_info(device)[1] if on_gpu else psutil.virtual_memory().total,
        process_bytes=0 if on_gpu else psutil.Process().memory_info().rss,
        product_tflops=product_tflops(device, pick_dtype(recipe.lm, config)),
        traffic_tb_s=_traffic_tb_s(device),
        batches=batches,
        layer_seconds=layers,
        rest_seconds=rest,
        step_seconds={name: step for name, (step, _) in by_sae.items()},
        calibration_seconds={name: per_row for name, (_, per_row) in by_sae.items()},
        corpus_seconds=corpus_seconds,
    )


def product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of one large square product, in 10^12 FLOPs per second."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / _seconds(lambda: a @ a, device) / 1e12


def batches_of(recipe: Recipe, device: torch.device, lengths: Sequence[int] = ()) -> Batches:
    """How a window of conversations of such `lengths` is cut; without any, of lengths like real ones."""
    window, budget = recipe.activations.window_tokens, recipe.corpus.batch_tokens
    drawn: list[int] = []
    tokens = 0
    for length in cycle(lengths or _like_real(window, recipe.corpus.max_length)):
        if tokens >= window:
            break
        drawn.append(length)
        tokens += length
    shapes = sorted((len(members), drawn[members[0]]) for members in cut(drawn, budget, device))
    by_size = sorted(shapes, key=lambda shape: shape[0] * shape[1])
    return Batches(len(shapes), by_size[len(by_size) // 2], sum(rows * longest for rows, longest in shapes) / tokens)


def _like_real(window: int, longest: int) -> list[int]:
    """Lengths of conversations of at most `longest` tokens, enough for a window, in a fixed random order."""
    random = np.random.default_rng(0)
    drawn = random.lognormal(math.log(_MEDIAN), _SPREAD, max(1, window // min(_MEDIAN, longest)))
    return [int(length) for length in drawn.clip(min(_LEAST, longest), longest)]


def _conversations(recipe: Recipe) -> tuple[list[int], float]:
    """Lengths of conversations of sources on this machine (none where they are elsewhere), and seconds per token of
    reading them: 0 where other processes read ahead.
    """
    generated_or_local = all(source.path or source.generated for source in recipe.corpus.sources)
    if not generated_or_local:
        return [], 0.0
    stream = CorpusStream(recipe.corpus, load_tokenizer(recipe.lm), seed=recipe.seed)
    lengths = [len(conversation.token_ids) for conversation in islice(stream, 1)]  # opens what it reads from
    began, opened = time.perf_counter(), sum(lengths)
    while time.perf_counter() - began < _SECONDS and (conversation := next(stream, None)) is not None:
        lengths.append(len(conversation.token_ids))
    seconds = time.perf_counter() - began
    stream.close()
    tokens = sum(lengths) - opened
    return lengths, seconds / tokens if tokens and not recipe.corpus.workers else 0.0


def _traffic_tb_s(device: torch.device) -> float:
    """Bytes read and written by one large copy, in 10^12 per second."""
    source = torch.zeros(1 << (28 if device.type == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device) / 1e12


@torch.no_grad()
def _layer_seconds(
    recipe: Recipe, config: PretrainedConfig, shape: tuple[int, int], device: torch.device
) -> tuple[dict[Kind, float], float]:
    """Per position of each kind of layer, and of the rest, in the shallowest model that has all kinds."""
    kinds = layer_kinds(config)[: recipe.last_layer + 1]
    depth = 1 + max(kinds.index(kind) for kind in set(kinds))
    with device:
        model: Any = AutoModel.from_config(  # type: ignore[no-untyped-call]
            cut_config(config, depth), dtype=pick_dtype(recipe.lm, config)
        )
    model.train(False)
    ids_CT = torch.randint(config.vocab_size, shape, device=device)
    layers: list[float] = []  # of all passes, one after the other

    def watch(layer: nn.Module) -> None:
        began = 0.0

        def before(_module: nn.Module, _inputs: Any) -> None:
            nonlocal began
            began = _now(device)

        def after(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            layers.append(_now(device) - began)

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    for layer in decoder_layers(model, depth):
        watch(layer)
    whole = _seconds(lambda: model(input_ids=ids_CT, use_cache=False), device)
    times: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    later = layers[depth:]  # in the first pass kernels are compiled
    for taken, kind in zip(later, cycle(kinds[:depth]), strict=False):
        times[kind].append(taken)
    passes = [sum(layers[start : start + depth]) for start in range(depth, len(layers), depth)]
    positions = ids_CT.numel()
    return {kind: min(taken) / positions for kind, taken in times.items()}, max(0.0, whole - min(passes)) / positions


def _size(point: HookPoint) -> tuple[int, int, str]:
    """What the time of a step depends on, as `SAE` takes it."""
    return point.dict_size, point.k, point.activation


def _step_seconds(recipe: Recipe, size: tuple[int, int, str], hidden: int, device: torch.device) -> tuple[Range, float]:
    """One trainer's step on random rows, with a share of its latents dead and with none; its calibration, per row."""
    training = recipe.training
    trainer = SAETrainer(
        SAE(hidden, *size, seed=0).to(device),
        1e-6,
        aux_coefficient=training.aux_coefficient,
        aux_k=training.aux_k,
        normalise=training.normalise,
        precision=training.precision,
        clip_norm=training.clip_norm,
        moments=getattr(torch, training.moments),
    )
    rows_BD = torch.randn(training.batch_size, hidden, device=device)
    calibration = _seconds(lambda: trainer.calibrate(rows_BD), device) / len(rows_BD)
    dead = slice(0, int(DEAD_SHARE * size[0]))
    alive = _seconds(lambda: trainer.step(rows_BD), device)
    trainer.weights["encoder_bias"][dead] = -1e3  # out of reach: they stay dead
    trainer.ages.tokens_N[dead] = trainer.ages.dead_after_tokens
    return (_seconds(lambda: trainer.step(rows_BD), device), alive), calibration


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Least time of a call after one to warm up: neighbours on a machine only ever slow it down."""
    call()
    times: list[float] = []
    while len(times) < 2 or (sum(times) < _SECONDS and len(times) < _REPEATS):
        began = _now(device)
        call()
        times.append(_now(device) - began)
    return min(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
