"""What a run will need before anyone rents a machine: memory per component, tokens per second, hours, cost.

A roofline: every part takes the longer of its arithmetic and its memory traffic, at a stated share of the data sheet's
peaks. The language model is built on the meta device, so its parameters are counted, not guessed. The two ends of each
range are an optimistic and a cautious efficiency; `docs/scaling.md` compares plans with measurements.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from qwenscope.errors import ModelError, RecipeError
from qwenscope.lm.load import check_hook_points, cut_config, layer_kinds, load_config
from qwenscope.recipe import HookPoint, LMRecipe, Recipe

GIB = 1 << 30
_BYTES = {"float32": 4, "bfloat16": 2, "auto": 2}


@dataclass(frozen=True)
class Gpu:
    """Data-sheet peaks of one card; `usd_per_hour` is the span of on-demand prices seen in 2026, for orientation."""

    memory_gib: float
    bf16_tflops: float
    bandwidth_tb_s: float
    usd_per_hour: tuple[float, float]


GPUS: dict[str, Gpu] = {
    "h200": Gpu(141, 989, 4.8, (2.3, 5.0)),
    "h100": Gpu(80, 989, 3.35, (1.8, 4.0)),
    "b200": Gpu(180, 2250, 8.0, (3.8, 7.0)),
    "a100": Gpu(80, 312, 2.0, (1.1, 2.5)),
    "l40s": Gpu(48, 362, 0.86, (0.8, 1.9)),
    "4090": Gpu(24, 165, 1.0, (0.3, 0.7)),
}

# (cautious, optimistic) share of peak: the language model's many small expert products, one large product, traffic.
_LM_SHARE = (0.25, 0.45)
_PRODUCT_SHARE = (0.65, 0.85)
_TRAFFIC_SHARE = (0.55, 0.85)
_ONE_CARD = ["`train` drives one card so far; this plan is for when it shares the SAEs among several"]
_RESERVE = 0.92  # share of a card's memory that a run can really use


def plan(recipe: Recipe, gpu: str = "h200", gpus: int = 1) -> dict[str, Any]:
    """Memory, speed, time and cost of a recipe as one JSON-able object.

    Args:
        recipe: What to train.
        gpu: A name of `GPUS`.
        gpus: Cards; each runs the language model on its own conversations and owns its share of the SAEs.

    Raises:
        RecipeError: unknown card.
        ModelError: the model's config is not to be had, or lacks a hook point.
    """
    if gpu.lower() not in GPUS:
        raise RecipeError(f"--gpu {gpu} is unknown; one of {', '.join(GPUS)}")
    card = GPUS[gpu.lower()]
    config = _config(recipe.lm)
    check_hook_points(layer_kinds(config), recipe.hook_points)
    size = model_size(config, recipe.layers[-1] + 1)
    owned = _owned_by_fullest_rank(recipe, config.hidden_size, gpus)
    memory = _memory(recipe, config.hidden_size, size.parameters, owned)
    forward = [size.flops_per_token / (card.bf16_tflops * 1e12 * share) / gpus for share in _LM_SHARE]
    steps = [_steps_seconds(recipe, owned, config.hidden_size, card, end) for end in (0, 1)]
    slow, fast = (1 / (a + b / recipe.training.batch_size) for a, b in zip(forward, steps, strict=True))
    hours = [recipe.training.tokens / rate / 3600 for rate in (fast, slow)]
    total = sum(memory.values())
    fits = total <= card.memory_gib * GIB * _RESERVE
    return {
        "gpu": gpu.lower(),
        "gpus": gpus,
        "model": {"layers": recipe.layers[-1] + 1, **asdict(size)},
        "memory_bytes": memory,
        "memory_total_bytes": total,
        "memory_card_bytes": int(card.memory_gib * GIB),
        "fits": fits,
        "tokens_per_second": [round(slow), round(fast)],
        "hours": [round(value, 2) for value in hours],
        "cost_usd": [round(h * gpus * price, 2) for h, price in zip(hours, card.usd_per_hour, strict=True)],
        "advice": ([] if fits else _advice(memory, card, recipe)) + (_ONE_CARD if gpus > 1 else []),
    }


@dataclass(frozen=True)
class ModelSize:
    """Of the truncated language model without LM head."""

    parameters: int
    active_parameters: int
    flops_per_token: int


def model_size(config: PretrainedConfig, layers: int) -> ModelSize:
    """Count the first `layers` layers on the meta device: 2 FLOPs per active weight and token, plus the mixers' state.

    Of a mixture of experts only the routed share is active; embeddings are looked up, not multiplied. The length-
    dependent part of attention is left out: below 1 % at 2,048 tokens.
    """
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(cut_config(config, layers))  # type: ignore[no-untyped-call]
    routed = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    parameters = active = 0.0
    for name, weight in model.named_parameters():
        parameters += weight.numel()
        if weight.ndim >= 2 and "embed" not in name:
            active += weight.numel() * (routed if ".experts." in name else 1)
    delta_layers = sum(kind == "deltanet" for kind in layer_kinds(config)[:layers])
    heads = getattr(config, "linear_num_value_heads", 0)
    state = heads * getattr(config, "linear_key_head_dim", 0) * getattr(config, "linear_value_head_dim", 0)
    return ModelSize(int(parameters), int(active), int(2 * active + 8 * delta_layers * state))


def _config(lm: LMRecipe) -> PretrainedConfig:
    """The model's config; the first subject's sizes are transformers' defaults, so a plan for it needs no network."""
    try:
        return load_config(lm)
    except ModelError:
        if lm.model != "Qwen/Qwen3.5-35B-A3B":
            raise
        from transformers import Qwen3_5MoeTextConfig

        return Qwen3_5MoeTextConfig()


def _owned_by_fullest_rank(recipe: Recipe, hidden: int, gpus: int) -> list[HookPoint]:
    """Largest first, each to the rank with the least so far: the SAEs of the rank that waits for nobody."""
    ranks: list[list[HookPoint]] = [[] for _ in range(gpus)]
    for point in sorted(recipe.hook_points.values(), key=lambda p: -p.dict_size):
        min(ranks, key=lambda rank: sum(p.dict_size * hidden for p in rank)).append(point)
    return max(ranks, key=lambda rank: sum(p.dict_size for p in rank))


def _memory(recipe: Recipe, hidden: int, parameters: int, owned: list[HookPoint]) -> dict[str, int]:
    training, width = recipe.training, _BYTES[recipe.lm.dtype]
    moment = 4 if training.moments == "float32" else 2
    weights = sum(2 * point.dict_size * hidden for point in owned)
    widest = max(point.dict_size for point in recipe.hook_points.values())
    return {
        "language_model": parameters * width,
        # the widest live tensors of a layer: residual stream, mixer projections and routed expert inputs, about 24 rows
        "language_model_activations": recipe.corpus.batch_tokens * hidden * width * 24,
        "windows": 2 * recipe.activations.window_tokens * hidden * width * len(recipe.layers),
        "sae_weights": weights * 4,
        "sae_moments": weights * 2 * moment,
        "sae_shadows": weights * 2 if training.precision in ("auto", "bf16", "exact") else 0,
        "step": training.batch_size * (widest * 2 + hidden * 12),
    }


def _steps_seconds(recipe: Recipe, owned: list[HookPoint], hidden: int, card: Gpu, end: int) -> float:
    """One sparse step of each owned SAE: the encoder product, then traffic of selection, gathers and the optimiser."""
    batch = recipe.training.batch_size
    moment = 4 if recipe.training.moments == "float32" else 2
    seconds = 0.0
    for point in owned:
        product = 2 * batch * hidden * point.dict_size / (card.bf16_tflops * 1e12 * _PRODUCT_SHARE[end])
        preactivations = 2 * batch * point.dict_size * 2
        gathers = 5 * batch * point.k * hidden * 2
        optimiser = 2 * point.dict_size * hidden * (2 * 4 + 4 * moment + 2)
        traffic = preactivations + gathers + optimiser
        seconds += product + traffic / (card.bandwidth_tb_s * 1e12 * _TRAFFIC_SHARE[end])
    return seconds


def _advice(memory: dict[str, int], card: Gpu, recipe: Recipe) -> list[str]:
    """What to change so that it fits, the most effective first."""
    room = card.memory_gib * GIB * _RESERVE
    over = sum(memory.values()) - room
    advice = [f"{over / GIB:.1f} GiB more than {_RESERVE:.0%} of one card"]
    if memory["windows"] > over:
        smaller = int(recipe.activations.window_tokens * (1 - over / memory["windows"]) / 1024) * 1024
        advice.append(f"activations.window_tokens: {smaller} fits")
    if memory["sae_moments"] / 2 > over and recipe.training.moments == "float32":
        advice.append("training.moments: bfloat16 fits")
    if memory["language_model"] > room:
        advice.append("the language model alone is too large: a card with more memory, or an FP8 checkpoint")
    return advice
