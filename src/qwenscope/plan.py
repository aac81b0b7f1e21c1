"""What a recipe needs and how long it takes, before anyone rents a machine.

A roofline: each part's time is its products at the card's product rate plus its memory traffic at the card's bandwidth.
For a card that is not here, the rates are stated shares of the data sheet's peaks, a cautious and an optimistic one at
the ends of each range. The language model is built on the meta device, so its parameters are counted, not guessed.
`docs/scaling.md` compares plans with measurements.

Several cards (`torchrun`): each runs the language model on its own conversations and owns some of the SAEs; in every
step the rows of a hook point travel to the card that owns its SAE. So the language model's time is divided among the
cards, and a step lasts as long as that of the card with the most to do.
"""

from __future__ import annotations

from collections.abc import Mapping
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
Range = tuple[float, float]
"""(cautious, optimistic)"""


@dataclass(frozen=True)
class Gpu:
    """Data-sheet peaks of one card.

    link_gb_s: to the other cards of its machine, one direction. usd_per_hour: span of on-demand prices seen in 2026,
    for orientation.
    """

    memory_gib: float
    bf16_tflops: float
    bandwidth_tb_s: float
    link_gb_s: float
    usd_per_hour: Range


GPUS: dict[str, Gpu] = {
    "h200": Gpu(141, 989, 4.8, 450, (2.3, 5.0)),
    "h100": Gpu(80, 989, 3.35, 450, (1.8, 4.0)),
    "b200": Gpu(180, 2250, 8.0, 900, (3.8, 7.0)),
    "a100": Gpu(80, 312, 2.0, 300, (1.1, 2.5)),
    "l40s": Gpu(48, 362, 0.86, 32, (0.8, 1.9)),
    "4090": Gpu(24, 165, 1.0, 32, (0.3, 0.7)),
}

# Shares of peak: the language model's many small expert products, one large product, memory traffic, links.
_LM_SHARE: Range = (0.25, 0.45)
_PRODUCT_SHARE: Range = (0.65, 0.85)
_TRAFFIC_SHARE: Range = (0.55, 0.85)
_LINK_SHARE: Range = (0.4, 0.8)
_MACHINE = 8  # cards that share fast links
_NETWORK_GB_S = 50.0  # between machines: one adapter of 400 Gbit/s per card
_PADDING = 1.04  # positions per token in length-bucketed batches of real conversations
_RESERVE = 0.92  # share of a card's memory that a run can really use


def plan(recipe: Recipe, gpu: str = "h200", gpus: int = 1, tokens: int | None = None) -> dict[str, Any]:
    """Memory, speed, time and cost of a recipe as one JSON-able object.

    Args:
        recipe: What to train.
        gpu: A name of `GPUS`.
        gpus: Cards; each runs the language model on its own conversations and owns its share of the SAEs.
        tokens: Length of the run; None takes the recipe's.

    Returns:
        gpu, gpus, tokens; model {layers, parameters, active_parameters, flops_per_token}; of the fullest card
        memory_bytes {component: bytes}, memory_total_bytes, memory_card_bytes, fits; owners [[sae_id, ...] per card];
        seconds_per_step {language_model, saes, exchange} of one batch of `training.batch_size` rows, each
        [cautious, optimistic]; bytes_per_step, sent by all cards together; tokens_per_second [cautious, optimistic];
        hours and cost_usd [optimistic, cautious]; advice [sentence, ...].

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
    steps = {name: _step_seconds(recipe, point, config.hidden_size, card) for name, point in recipe.hook_points.items()}
    owners = balance({name: cautious for name, (cautious, _) in steps.items()}, gpus)
    moved = bytes_moved(recipe, owners, config.hidden_size)
    seconds = {
        "language_model": [_lm_seconds(recipe, size, card, share) / gpus for share in _LM_SHARE],
        "saes": [max(sum(steps[name][end] for name in owned) for owned in owners) for end in (0, 1)],
        "exchange": [_exchange_seconds(recipe, owners, config.hidden_size, card, share) for share in _LINK_SHARE],
    }
    rates = [recipe.training.batch_size / sum(part[end] for part in seconds.values()) for end in (0, 1)]
    length = tokens or recipe.training.tokens
    hours = [length / rate / 3600 for rate in reversed(rates)]
    fullest = max(owners, key=lambda owned: sum(recipe.hook_points[name].dict_size for name in owned))
    memory = _memory(recipe, config.hidden_size, size.parameters, [recipe.hook_points[name] for name in fullest])
    total = sum(memory.values())
    fits = total <= card.memory_gib * GIB * _RESERVE
    return {
        "gpu": gpu.lower(),
        "gpus": gpus,
        "tokens": length,
        "model": {"layers": recipe.layers[-1] + 1, **asdict(size)},
        "memory_bytes": memory,
        "memory_total_bytes": total,
        "memory_card_bytes": int(card.memory_gib * GIB),
        "fits": fits,
        "owners": owners,
        "seconds_per_step": seconds,
        "bytes_per_step": moved,
        "tokens_per_second": [round(rate) for rate in rates],
        "hours": [round(value, 2) for value in hours],
        "cost_usd": [round(h * gpus * price, 2) for h, price in zip(hours, card.usd_per_hour, strict=True)],
        "advice": [] if fits else _advice(memory, card, recipe),
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


def balance(costs: Mapping[str, float], cards: int) -> list[list[str]]:
    """Names per card, the dearest first, each to the card with the least so far; a card may stay empty."""
    owners: list[list[str]] = [[] for _ in range(cards)]
    for name in sorted(costs, key=lambda name: -costs[name]):
        min(owners, key=lambda owned: sum(costs[other] for other in owned)).append(name)
    return owners


def bytes_moved(recipe: Recipe, owners: list[list[str]], hidden: int) -> int:
    """Bytes that all cards together send in one step: of each owner's hooked layers, the rows that others harvested."""
    return sum(_received(recipe, owned, hidden, len(owners)) for owned in owners)


def _received(recipe: Recipe, owned: list[str], hidden: int, cards: int) -> int:
    layers = {recipe.hook_points[name].layer for name in owned}
    return len(layers) * (recipe.training.batch_size * (cards - 1) // cards) * hidden * _BYTES[recipe.lm.dtype]


def _exchange_seconds(recipe: Recipe, owners: list[list[str]], hidden: int, card: Gpu, share: float) -> float:
    """Until the card that receives the most has it."""
    busiest = max(_received(recipe, owned, hidden, len(owners)) for owned in owners)
    link = card.link_gb_s if len(owners) <= _MACHINE else min(card.link_gb_s, _NETWORK_GB_S)
    return busiest / (link * 1e9 * share)


def _lm_seconds(recipe: Recipe, size: ModelSize, card: Gpu, share: float) -> float:
    """The truncated forward pass over one training batch's tokens."""
    return recipe.training.batch_size * _PADDING * size.flops_per_token / (card.bf16_tflops * 1e12 * share)


def _step_seconds(recipe: Recipe, point: HookPoint, hidden: int, card: Gpu) -> Range:
    """One sparse step: the encoder product, then traffic of selection, gathers and the optimiser."""
    batch = recipe.training.batch_size
    moment = 4 if recipe.training.moments == "float32" else 2
    product = 2 * batch * hidden * point.dict_size
    preactivations = 2 * batch * point.dict_size * 2
    gathers = 5 * batch * point.k * hidden * 2
    optimiser = 2 * point.dict_size * hidden * (2 * 4 + 4 * moment + 2)
    traffic = preactivations + gathers + optimiser
    cautious, optimistic = (
        product / (card.bf16_tflops * 1e12 * products) + traffic / (card.bandwidth_tb_s * 1e12 * bandwidth)
        for products, bandwidth in zip(_PRODUCT_SHARE, _TRAFFIC_SHARE, strict=True)
    )
    return cautious, optimistic


def _config(lm: LMRecipe) -> PretrainedConfig:
    """The model's config; the first subject's sizes are transformers' defaults, so a plan for it needs no network."""
    try:
        return load_config(lm)
    except ModelError:
        if lm.model != "Qwen/Qwen3.5-35B-A3B":
            raise
        from transformers import Qwen3_5MoeTextConfig

        return Qwen3_5MoeTextConfig()


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
