"""What a recipe needs and how long it takes, before anyone rents a machine.

A roofline: each part's time is its products at the card's product rate plus its memory traffic at the card's bandwidth.
For a card that is not here, the rates are stated shares of the data sheet's peaks, a cautious and an optimistic one at
the ends of each range. The language model is built on the meta device, so its parameters are counted, not guessed.
`docs/plan.md` compares plans with measurements.

Several cards (`torchrun`): each runs some of a window's language-model batches and owns some of the SAEs, to which rows
travel. A card with more SAE steps to do harvests less, so time is evened out as far as whole batches and the card with
the most SAEs allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, Qwen3_5MoeTextConfig

from qwenscope.calibration import Measured
from qwenscope.errors import ModelError, RecipeError
from qwenscope.lm.load import check_hook_points, cut_config, layer_kinds, load_config, pick_dtype
from qwenscope.recipe import HookPoint, Recipe
from qwenscope.training.gradients import DENSE_SHARE
from qwenscope.training.parallel import owners
from qwenscope.training.shards import Piece

GIB = 1 << 30
Range = tuple[float, float]
"""(cautious, optimistic)"""
Owned = list[list[Piece]]
"""SAEs, or latents of them, per card."""


@dataclass(frozen=True)
class Card:
    """Peaks of one card, from its data sheet or measured.

    link_gb_s: to the other cards of its machine, one direction. usd_per_hour: span of on-demand prices seen in 2026,
    for orientation; None where nothing is known.
    """

    memory_gib: float
    bf16_tflops: float
    bandwidth_tb_s: float
    link_gb_s: float
    usd_per_hour: Range | None


GPUS: dict[str, Card] = {
    "h200": Card(140, 989, 4.8, 450, (2.3, 5.0)),
    "h100": Card(79.6, 989, 3.35, 450, (1.8, 4.0)),
    "b200": Card(179, 2250, 8.0, 900, (3.8, 7.0)),
    "a100": Card(79.2, 312, 2.0, 300, (1.1, 2.5)),
    "l40s": Card(45, 362, 0.86, 32, (0.8, 1.9)),
    "4090": Card(24, 165, 1.0, 32, (0.3, 0.7)),
}

# Shares of peak: the language model's many small expert products, one large product, memory traffic, links.
_LM_SHARE: Range = (0.25, 0.45)
_PRODUCT_SHARE: Range = (0.65, 0.85)
_TRAFFIC_SHARE: Range = (0.55, 0.85)
_LINK_SHARE: Range = (0.4, 0.8)
_AROUND: Range = (1.25, 0.95)  # of measured times: gathers, logs, checkpoints and more dead latents come on top of them
_MACHINE = 8  # cards that share fast links
_NETWORK_GB_S = 50.0  # between machines: one adapter of 400 Gbit/s per card
_PADDING = 1.05  # positions per token in length-bucketed batches of real conversations
_BATCH_TOKENS = 10_000  # of a language-model batch of real conversations (corpus/batches.py)
_RESERVE = 0.92  # share of a card's memory that a run can really use


def plan(
    recipe: Recipe, gpu: str = "h200", gpus: int = 1, tokens: int | None = None, measured: Measured | None = None
) -> dict[str, Any]:
    """Memory, speed, time and cost of a recipe as one JSON-able object.

    Args:
        recipe: What to train.
        gpu: A name of `GPUS`; with `measured`, of no account.
        gpus: Cards; each runs the language model on its own conversations and owns its share of the SAEs.
        tokens: Length of the run; None takes the recipe's.
        measured: What `calibration.measure` found for this recipe on the device at hand: plan for devices like it.

    Returns:
        gpu, gpus, tokens; measured {product_tflops, traffic_tb_s, lm_share of the product rate} or None;
        model {layers, parameters, active_parameters, flops_per_token}; of the fullest card
        memory_bytes {component: bytes}, memory_total_bytes, memory_card_bytes, fits; owners [[sae_id, ...] per card];
        seconds_per_step of one batch of `training.batch_size` rows, each [cautious, optimistic]: language_model and
        saes of all cards together, saes_of_busiest_card, exchange, corpus, and step, what it takes from end to end;
        bytes_per_step, sent by all cards together; tokens_per_second [cautious, optimistic]; hours and cost_usd
        [optimistic, cautious] (cost null where no price is known); advice [sentence, ...].

    Raises:
        RecipeError: unknown card.
        ModelError: the model's config is not to be had, or lacks a hook point.
    """
    name, card = (gpu.lower(), _card(gpu)) if measured is None else (measured.device, _card_like(measured))
    config = read_config(recipe)
    size = model_size(config, recipe.layers[-1] + 1)
    lm_seconds, steps = _roofline(recipe, config, size, card) if measured is None else _timed(recipe, config, measured)
    owned = owners(recipe, gpus)
    seconds = {
        "language_model": lm_seconds,
        "saes": [sum(step[end] for step in steps.values()) for end in (0, 1)],
        "saes_of_busiest_card": [
            max(sum(steps[p.sae_id][end] * p.latents / p.dict_size for p in pieces) for pieces in owned)
            for end in (0, 1)
        ],
        "exchange": [_exchange_seconds(recipe, owned, config, card, share) for share in _LINK_SHARE],
        "corpus": [recipe.training.batch_size * measured.corpus_seconds if measured else 0.0] * 2,
    }
    seconds["step"] = _evened_out(recipe, seconds, gpus)
    rates = [recipe.training.batch_size / value for value in seconds["step"]]
    length = tokens or recipe.training.tokens
    hours = [length / rate / 3600 for rate in reversed(rates)]
    process = measured.process_bytes if measured and measured.device == "cpu" else None

    def needs(changed: Recipe) -> dict[str, int]:
        return memory_needs(changed, config, size.parameters, owned, process)

    memory, room = needs(recipe), card.memory_gib * GIB * _RESERVE
    cost = [h * gpus * price for h, price in zip(hours, card.usd_per_hour, strict=True)] if card.usd_per_hour else None
    return {
        "gpu": name,
        "gpus": gpus,
        "tokens": length,
        "measured": None if measured is None else _rates(measured, config, size),
        "model": asdict(size),
        "memory_bytes": memory,
        "memory_total_bytes": sum(memory.values()),
        "memory_card_bytes": int(card.memory_gib * GIB),
        "fits": sum(memory.values()) <= room,
        "owners": [[piece.stem for piece in pieces] for pieces in owned],
        "seconds_per_step": seconds,
        "bytes_per_step": bytes_moved(recipe, owned, config),
        "tokens_per_second": [round(rate) for rate in rates],
        "hours": [round(value, 2) for value in hours],
        "cost_usd": cost and [round(value, 2) for value in cost],
        "advice": _advice(recipe, needs, room, gpus),
    }


def read_config(recipe: Recipe) -> PretrainedConfig:
    """The model's config, its hook points checked; the first subject's sizes are transformers' defaults, so a plan for
    it needs no network.

    Raises:
        ModelError: the config is not to be had, or lacks a hook point.
    """
    try:
        config = load_config(recipe.lm)
    except ModelError:
        if recipe.lm.model != "Qwen/Qwen3.5-35B-A3B":
            raise
        config = Qwen3_5MoeTextConfig(dtype="bfloat16")
    check_hook_points(layer_kinds(config), recipe.hook_points)
    return config


@dataclass(frozen=True)
class ModelSize:
    """Of the truncated language model without LM head."""

    layers: int
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
    return ModelSize(layers, int(parameters), int(active), int(2 * active + 8 * delta_layers * state))


def bytes_moved(recipe: Recipe, owned: Owned, config: PretrainedConfig) -> int:
    """Bytes that all cards together send per step: rows that their owner did not harvest, and four bytes per token and
    hook point to everyone else, the norms that decide which rows are left out.
    """
    cards = len(owned)
    norms = 4 * recipe.training.batch_size * len(recipe.layers) * (cards - 1)
    return norms + sum(_received(recipe, pieces, config, cards) for pieces in owned)


def _received(recipe: Recipe, pieces: list[Piece], config: PretrainedConfig, cards: int) -> int:
    rows = recipe.training.batch_size * (cards - 1) // cards
    return len(_layers(recipe, pieces)) * rows * int(config.hidden_size) * pick_dtype(recipe.lm, config).itemsize


def _layers(recipe: Recipe, pieces: list[Piece]) -> set[int]:
    return {recipe.hook_points[piece.sae_id].layer for piece in pieces}


def _exchange_seconds(recipe: Recipe, owned: Owned, config: PretrainedConfig, card: Card, share: float) -> float:
    """Until the card that receives the most has it."""
    busiest = max(_received(recipe, pieces, config, len(owned)) for pieces in owned)
    link = card.link_gb_s if len(owned) <= _MACHINE else min(card.link_gb_s, _NETWORK_GB_S)
    return busiest / (link * 1e9 * share)


def _evened_out(recipe: Recipe, seconds: Mapping[str, Sequence[float]], gpus: int) -> list[float]:
    """Seconds from end to end: all work shared evenly, but nobody does less than one whole batch or its own SAEs.

    The cautious end lets every card wait for one more batch (the bound of dealing the largest first).
    """
    batches = window_batches(recipe)
    ends = []
    for end in (0, 1):
        forward, steps = seconds["language_model"][end], seconds["saes"][end]
        even, one_batch = (forward + steps) / gpus, forward / batches
        even = max(even, one_batch) if end else even + one_batch * (1 - 1 / gpus)
        ends.append(max(even, seconds["saes_of_busiest_card"][end]) + seconds["exchange"][end] + seconds["corpus"][end])
    return ends


def window_batches(recipe: Recipe) -> int:
    """Language-model batches of one window of real conversations."""
    return max(1, recipe.activations.window_tokens // min(recipe.corpus.batch_tokens, _BATCH_TOKENS))


def _roofline(
    recipe: Recipe, config: PretrainedConfig, size: ModelSize, card: Card
) -> tuple[list[float], dict[str, Range]]:
    """Seconds of the truncated forward over one training batch, and of each SAE's step, from the card's peaks."""
    flops = recipe.training.batch_size * _PADDING * size.flops_per_token
    forward = [flops / (card.bf16_tflops * 1e12 * share) for share in _LM_SHARE]
    points = recipe.hook_points.items()
    return forward, {sae_id: _step_seconds(recipe, point, config.hidden_size, card) for sae_id, point in points}


def _timed(recipe: Recipe, config: PretrainedConfig, measured: Measured) -> tuple[list[float], dict[str, Range]]:
    """The same from measured times."""
    positions = recipe.training.batch_size * _PADDING
    forward = positions * measured.lm_seconds(layer_kinds(config)[: recipe.layers[-1] + 1])
    steps = measured.step_seconds.items()
    return [forward * factor for factor in _AROUND], {
        sae_id: (seconds * _AROUND[0], seconds * _AROUND[1]) for sae_id, seconds in steps
    }


def _step_seconds(recipe: Recipe, point: HookPoint, hidden: int, card: Card) -> Range:
    """One sparse step: the encoder product, then traffic of selection, gathers and the optimiser.

    Where many latents are active the tail uses three more dense products instead of gathers.
    """
    batch = recipe.training.batch_size
    dense = point.k / point.dict_size > DENSE_SHARE
    product = 2 * batch * hidden * point.dict_size * (4 if dense else 1)
    preactivations = 2 * batch * point.dict_size * 2
    gathers = 0 if dense else 5 * batch * point.k * hidden * 2
    optimiser = 2 * point.dict_size * hidden * (2 * 4 + 4 * _moment_bytes(recipe) + 2)
    traffic = preactivations + gathers + optimiser
    cautious, optimistic = (
        product / (card.bf16_tflops * 1e12 * products) + traffic / (card.bandwidth_tb_s * 1e12 * bandwidth)
        for products, bandwidth in zip(_PRODUCT_SHARE, _TRAFFIC_SHARE, strict=True)
    )
    return cautious, optimistic


def _card(gpu: str) -> Card:
    if gpu.lower() not in GPUS:
        raise RecipeError(f"--gpu {gpu} is unknown; one of {', '.join(GPUS)}")
    return GPUS[gpu.lower()]


def _card_like(measured: Measured) -> Card:
    """Measured memory and rates; links and price are the data sheet's where the name is a known one's."""
    known = next((card for name, card in GPUS.items() if name in measured.device.lower().split()), None)
    return Card(
        measured.memory_bytes / GIB,
        measured.product_tflops,
        measured.traffic_tb_s,
        known.link_gb_s if known else _NETWORK_GB_S,
        known.usd_per_hour if known else None,
    )


def _rates(measured: Measured, config: PretrainedConfig, size: ModelSize) -> dict[str, float]:
    seconds = measured.lm_seconds(layer_kinds(config)[: size.layers])
    return {
        "product_tflops": measured.product_tflops,
        "traffic_tb_s": measured.traffic_tb_s,
        "lm_share": size.flops_per_token / seconds / 1e12 / measured.product_tflops,
    }


def _moment_bytes(recipe: Recipe) -> int:
    return 4 if recipe.training.moments == "float32" else 2


def memory_needs(
    recipe: Recipe, config: PretrainedConfig, parameters: int, owned: Owned, process: int | None = None
) -> dict[str, int]:
    """Bytes of each component on the card that owns the most, at its fullest moment.

    Args:
        parameters: Of the truncated language model.
        owned: SAEs, or latents of them, per card.
        process: On a CPU, what the process itself takes; None means a GPU.
    """
    training, hidden, cpu = recipe.training, config.hidden_size, process is not None
    width = pick_dtype(recipe.lm, config).itemsize
    fullest = max(owned, key=lambda pieces: sum(piece.latents for piece in pieces))
    sizes = [piece.latents for piece in fullest]
    layers, cards = len(_layers(recipe, fullest)), len(owned)
    weights, widest = sum(2 * size * hidden for size in sizes), max(sizes)
    trained = weights * (4 + 2 * _moment_bytes(recipe))
    shadows = {"fp32": 0, "exact": weights * 2 // 2, "bf16": weights * 2, "auto": 0 if cpu else weights * 2}
    window = recipe.activations.window_tokens + recipe.corpus.max_length
    row = hidden * width
    needs = {
        "language_model": parameters * width // (recipe.lm.device.count(",") + 1),  # layers on several devices
        "language_model_activations": recipe.corpus.batch_tokens * _position_bytes(recipe, config, width, cpu),
        # while rows are left out one hook point exists twice; while rows travel, what is sent and what arrives
        # beside them, with overlap, the window that is consumed meanwhile
        "windows": window
        * row
        * (layers * (1 + recipe.activations.overlap) + (1 if cards == 1 else layers + 2 * len(recipe.layers) // cards)),
        "saes": trained + shadows[training.precision],
        # rows and residuals in float32; on a GPU pre-activations and both gradients of one SAE are whole
        "step": training.batch_size * hidden * 20 + (0 if cpu else widest * (2 * training.batch_size + 8 * hidden)),
    }
    return needs | {"checkpoint_copy": trained, "process": process} if cpu else needs


def _position_bytes(recipe: Recipe, config: PretrainedConfig, width: int, cpu: bool) -> int:
    """Bytes per position of a language-model batch that live at once: caught streams and the widest part of a layer.

    Fitted to traced allocations of one layer of each kind (docs/plan.md). Without fused kernels DeltaNet works on
    float32 copies and on matrices of 64 x 64 positions per head; with them, its part is an estimate.
    """
    hidden = int(config.hidden_size)
    heads = getattr(config, "linear_num_value_heads", 0)
    value_dim = heads * getattr(config, "linear_value_head_dim", 0)
    heads_dim = config.num_attention_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    routed = getattr(config, "num_experts_per_tok", None)
    parts = (
        value_dim * 44 + heads * 64 * 16 if cpu else value_dim * 14 * width,
        heads_dim * 7 * width,
        (4 * routed + 1) * hidden * width if routed else 3 * config.intermediate_size * width,
    )
    return (len(recipe.layers) + 3) * hidden * width + int(max(parts))


def _advice(recipe: Recipe, needs: Callable[[Recipe], dict[str, int]], room: float, gpus: int) -> list[str]:
    """What to change so that it fits, the cheapest first, as many as it takes; else what would feed all cards."""
    over = sum(needs(recipe).values()) - room
    if over <= 0:
        return _feeding(recipe, gpus)
    advice = [f"{over / GIB:.1f} GiB more than the {room / GIB:.1f} that a run can use"]
    changes = []
    for key, value, changed in _savings(recipe):
        changes.append(f"--set {key}={value}")
        if sum(needs(changed).values()) <= room:
            return [*advice, f"fits with {' '.join(changes)}"]
    return [
        *advice,
        "too large for this card whatever is set: take a card with more memory or an FP8 checkpoint, or spread the "
        "model's layers over several cards (--set lm.device=cuda:0,cuda:1)",
    ]


def _feeding(recipe: Recipe, gpus: int) -> list[str]:
    if gpus == 1 or (batches := window_batches(recipe)) >= 2 * gpus:
        return []
    window = 4 * gpus * min(recipe.corpus.batch_tokens, _BATCH_TOKENS)
    return [
        f"a window holds about {batches} language-model batches for {gpus} cards: "
        f"--set activations.window_tokens={1 << (window - 1).bit_length()} shares them evenly"
    ]


def _savings(recipe: Recipe) -> Iterator[tuple[str, int | str, Recipe]]:
    """(key, value, recipe with all changes so far): less memory at little or no cost."""
    batch_tokens = max(recipe.corpus.max_length, 8192)
    if batch_tokens < recipe.corpus.batch_tokens:
        recipe = _changed(recipe, "corpus", batch_tokens=batch_tokens)
        yield "corpus.batch_tokens", batch_tokens, recipe
    if recipe.activations.overlap:
        recipe = _changed(recipe, "activations", overlap=False)
        yield "activations.overlap", "false", recipe
    window = max(recipe.training.batch_size, recipe.activations.window_tokens // 2)
    if window < recipe.activations.window_tokens:
        recipe = _changed(recipe, "activations", window_tokens=window)
        yield "activations.window_tokens", window, recipe
    if recipe.training.moments == "float32":
        recipe = _changed(recipe, "training", moments="bfloat16")
        yield "training.moments", "bfloat16", recipe


def _changed(recipe: Recipe, part: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={part: getattr(recipe, part).model_copy(update=values)})
