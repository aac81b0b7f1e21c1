"""What a recipe needs and how long it takes, before anyone rents a machine.

Parts are priced by `roofline`, or by what `calibration` measured on the device at hand. For a card that is not here,
the rates are stated shares of the data sheet's peaks, a cautious and an optimistic one at the ends of each range. The
language model is built on the meta device, so its parameters are counted, not guessed. `docs/plan.md` compares plans
with measurements.

Several cards (`torchrun`): each runs some of a window's language-model batches and owns some of the SAEs, to which rows
travel. A card with more SAE steps to do harvests less, so time is evened out as far as whole batches and the card with
the most SAEs allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from transformers import PretrainedConfig, Qwen3_5MoeTextConfig

from qwenscope.calibration import Measured
from qwenscope.errors import ModelError
from qwenscope.lm.load import Kind, check_hook_points, layer_kinds, load_config, pick_dtype
from qwenscope.recipe import Recipe
from qwenscope.roofline import (
    GPUS,
    NETWORK_GB_S,
    Card,
    ModelSize,
    Piece,
    Range,
    bytes_moved,
    exchange_seconds,
    find_card,
    layers_of,
    model_size,
    moment_bytes,
    position_seconds,
    step_seconds,
)
from qwenscope.training.parallel import owners

GIB = 1 << 30
Held = Sequence[Sequence[Piece]]
"""What each card holds."""

_AROUND: Range = (1.25, 0.95)  # of measured times: gathers, logs, checkpoints and more dead latents come on top of them
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
    name, card = (gpu.lower(), find_card(gpu)) if measured is None else (measured.device, _card_like(measured))
    config = read_config(recipe)
    size = model_size(config, recipe.layers[-1] + 1)
    held = _held(recipe, gpus)
    position = (
        position_seconds(size, card) if measured is None else _around(measured.lm_seconds(_kinds(recipe, config)))
    )
    steps = [[_piece_seconds(recipe, piece, config, card, measured) for piece in pieces] for pieces in held]
    seconds: dict[str, Sequence[float]] = {
        "language_model": [recipe.training.batch_size * _PADDING * value for value in position],
        "saes": [sum(step[end] for card_steps in steps for step in card_steps) for end in (0, 1)],
        "saes_of_busiest_card": [max(sum(step[end] for step in card_steps) for card_steps in steps) for end in (0, 1)],
        "exchange": exchange_seconds(recipe, held, config, card),
        "corpus": [recipe.training.batch_size * measured.corpus_seconds if measured else 0.0] * 2,
    }
    seconds["step"] = _evened_out(recipe, seconds, gpus)
    rates = [recipe.training.batch_size / value for value in seconds["step"]]
    length = tokens or recipe.training.tokens
    hours = [length / rate / 3600 for rate in reversed(rates)]
    process = measured.process_bytes if measured and measured.device == "cpu" else None

    def needs(changed: Recipe) -> dict[str, int]:
        return memory_needs(changed, config, size.parameters, held, process)

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
        "owners": [[sae_id for sae_id, _ in pieces] for pieces in held],
        "seconds_per_step": seconds,
        "bytes_per_step": bytes_moved(recipe, held, config),
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


def _held(recipe: Recipe, cards: int) -> list[list[Piece]]:
    return [[(sae_id, recipe.hook_points[sae_id].dict_size) for sae_id in ids] for ids in owners(recipe, cards)]


def _piece_seconds(
    recipe: Recipe, piece: Piece, config: PretrainedConfig, card: Card, measured: Measured | None
) -> Range:
    """One step of a piece of an SAE: by the roofline, or its share of a measured step."""
    sae_id, latents = piece
    point = recipe.hook_points[sae_id]
    if measured is None:
        return step_seconds(recipe, point, config.hidden_size, card, latents)
    return _around(measured.step_seconds[sae_id] * latents / point.dict_size)


def _around(seconds: float) -> Range:
    return seconds * _AROUND[0], seconds * _AROUND[1]


def _kinds(recipe: Recipe, config: PretrainedConfig) -> tuple[Kind, ...]:
    return layer_kinds(config)[: recipe.layers[-1] + 1]


def _card_like(measured: Measured) -> Card:
    """Measured memory and rates; links and price are the data sheet's where the name is a known one's."""
    known = next((card for name, card in GPUS.items() if name in measured.device.lower().split()), None)
    return Card(
        measured.memory_bytes / GIB,
        measured.product_tflops,
        measured.traffic_tb_s,
        known.link_gb_s if known else NETWORK_GB_S,
        known.usd_per_hour if known else None,
    )


def _rates(measured: Measured, config: PretrainedConfig, size: ModelSize) -> dict[str, float]:
    seconds = measured.lm_seconds(layer_kinds(config)[: size.layers])
    return {
        "product_tflops": measured.product_tflops,
        "traffic_tb_s": measured.traffic_tb_s,
        "lm_share": size.flops_per_token / seconds / 1e12 / measured.product_tflops,
    }


def memory_needs(
    recipe: Recipe, config: PretrainedConfig, parameters: int, held: Held, process: int | None = None
) -> dict[str, int]:
    """Bytes of each component on the card that owns the most, at its fullest moment.

    Args:
        parameters: Of the truncated language model.
        held: What each card holds of the SAEs.
        process: On a CPU, what the process itself takes; None means a GPU.
    """
    training, hidden, cpu = recipe.training, config.hidden_size, process is not None
    width = pick_dtype(recipe.lm, config).itemsize
    fullest = max(held, key=lambda pieces: sum(latents for _, latents in pieces))
    sizes = [latents for _, latents in fullest]
    layers, cards = len(layers_of(recipe, fullest)), len(held)
    weights, widest = sum(2 * size * hidden for size in sizes), max(sizes)
    trained = weights * (4 + 2 * moment_bytes(recipe))
    shadows = {"fp32": 0, "exact": weights * 2 // 2, "bf16": weights * 2, "auto": 0 if cpu else weights * 2}
    window = recipe.activations.window_tokens + recipe.corpus.max_length
    row = hidden * width
    needs = {
        "language_model": parameters * width // (recipe.lm.device.count(",") + 1),  # layers on several devices
        "language_model_activations": recipe.corpus.batch_tokens * _position_bytes(recipe, config, width, cpu),
        # while rows are left out one hook point exists twice; while rows travel, what is sent and what arrives
        "windows": window * row * (layers + (1 if cards == 1 else layers + 2 * len(recipe.layers) // cards)),
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
    window = max(recipe.training.batch_size, recipe.activations.window_tokens // 2)
    if window < recipe.activations.window_tokens:
        recipe = _changed(recipe, "activations", window_tokens=window)
        yield "activations.window_tokens", window, recipe
    if recipe.training.moments == "float32":
        recipe = _changed(recipe, "training", moments="bfloat16")
        yield "training.moments", "bfloat16", recipe


def _changed(recipe: Recipe, part: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={part: getattr(recipe, part).model_copy(update=values)})
