"""What a run holds in memory, and what to change so that it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from qwenscope.costs import EXPERTS, Card, sites_held, trained_bytes
from qwenscope.lm.load import FP8_CAPABILITY, pick_dtype
from qwenscope.lm.model import config_number
from qwenscope.lm.splice import CPU_CHUNK, GPU_CHUNK, LEAST_ROWS
from qwenscope.parallel.owners import Piece, owners, shared
from qwenscope.planning.measure import batches_of
from qwenscope.recipe import Recipe
from qwenscope.sae.activation import activation_of
from qwenscope.sae.ops import product_pays

GIB = 1 << 30
Held = Sequence[Sequence[Piece]]
"""What each card holds."""
Change = tuple[str, int | str]
"""(key of a recipe, value)"""

CARD = torch.device("cuda")
"""What a plan by data sheet is for."""
LARGE_WINDOW = 524_288
"""Tokens of a window whose batches are about as large as `corpus.batch_tokens` lets them be."""
_RESERVE = 0.92  # share of a card's memory that a run can really use


def fitting(
    recipe: Recipe,
    config: PretrainedConfig,
    parameters: int,
    gpus: int,
    card: Card,
    process: int | None,
    fused_mixer: bool,
) -> dict[str, Any]:
    """Of the fullest of `gpus` cards: memory_bytes {component: bytes}, memory_total_bytes, memory_card_bytes, fits, and
    advice [sentence, ...]; arguments as for `memory_needs`.
    """

    def needs(changed: Recipe) -> dict[str, int]:
        return memory_needs(changed, config, parameters, owners(changed, gpus), process, fused_mixer)

    def over(changes: Sequence[Change]) -> float:
        return sum(needs(_changed(recipe, changes)).values()) - room

    room = card.memory_gib * GIB * _RESERVE
    advice = _feeding(recipe, gpus, over) if over(()) <= 0 else _less(over, room, list(_savings(recipe, gpus)))
    if not advice and gpus == 1 and process is None and config_number(config, *EXPERTS):
        advice = _less_often(recipe, over)
    if over(()) > 0 and len(advice) == 1:
        smallest = _changed(recipe, list(_savings(recipe, gpus)))
        advice.append(_elsewhere(needs(smallest), room, pick_dtype(recipe.lm, config).itemsize, card))
    return {
        "memory_bytes": needs(recipe),
        "memory_total_bytes": sum(needs(recipe).values()),
        "memory_card_bytes": int(card.memory_gib * GIB),
        "fits": over(()) <= 0,
        "advice": advice,
    }


def row_bytes(recipe: Recipe, config: PretrainedConfig) -> int:
    """Of one row at one hook point, as the language model computes it."""
    return int(config.hidden_size) * pick_dtype(recipe.lm, config).itemsize


def memory_needs(
    recipe: Recipe,
    config: PretrainedConfig,
    parameters: int,
    held: Held,
    process: int | None = None,
    fused_mixer: bool = True,
) -> dict[str, int]:
    """Bytes of each component on the card that owns the most, at its fullest moment.

    Args:
        parameters: Of the truncated language model.
        held: What each card holds of the SAEs.
        process: On a CPU, what the process itself takes; None means a GPU.
        fused_mixer: Of a GPU, whether Gated DeltaNet has kernels of its own there.
    """
    training, hidden, cpu = recipe.training, config.hidden_size, process is not None
    width = pick_dtype(recipe.lm, config).itemsize
    fullest = max(held, key=lambda pieces: sum(piece.latents for piece in pieces))
    sizes = [piece.latents for piece in fullest]
    layers, cards = len(sites_held(recipe, fullest)), len(held)
    weights = sum(2 * size * hidden for size in sizes)
    trained = trained_bytes(recipe, sum(sizes), hidden)
    shadows = {"fp32": 0, "exact": weights * 2 // 2, "bf16": weights * 2, "auto": 0 if cpu else weights * 2}
    position = _position_bytes(recipe, config, width, fused_mixer, cpu)
    window = recipe.activations.window_tokens + recipe.corpus.max_length
    # while rows are left out one hook point exists twice; while rows travel, what is sent and what arrives
    travelling = 1 if cards == 1 else layers + 2 * len(recipe.sites) // cards
    overlap = recipe.activations.overlap and (cpu or not shared(held))  # GPUs that share an SAE take turns
    needs = {
        "language_model": parameters * width // (recipe.lm.device.count(",") + 1),  # layers on several devices
        "language_model_activations": recipe.corpus.batch_tokens * position,
        "windows": window * row_bytes(recipe, config) * (layers * (2 if overlap else 1) + travelling),
        "saes": trained + shadows[training.precision],
        "step": training.batch_size * (_step_bytes(recipe, fullest, hidden, cpu) + 4 * hidden * len(training.prefixes)),
    }
    if training.closes:
        needs["closing_phase"] = max(0, _closing_bytes(recipe, config, position, cpu) - needs["windows"])
    return needs | {"checkpoint_copy": trained, "process": process} if cpu else needs


def _closing_bytes(recipe: Recipe, config: PretrainedConfig, position: int, cpu: bool) -> int:
    """What a step inside the model holds for the way back, when windows are there no longer: of each layer above the
    lowest hook point about twice what lives at once in a layer, for the conversations of a step; and five chunks of
    float32 logits.
    """
    positions = min(recipe.corpus.batch_tokens, recipe.training.batch_size + recipe.corpus.max_length)
    layers = int(config.num_hidden_layers) - 1 - min(point.layer for point in recipe.hook_points.values())
    chunk = max(CPU_CHUNK if cpu else GPU_CHUNK, LEAST_ROWS * int(config.vocab_size))
    return 2 * position * positions * layers + 5 * 4 * chunk


def _step_bytes(recipe: Recipe, held: Sequence[Piece], hidden: int, cpu: bool) -> int:
    """Of one row in a step. A CPU has rows and residuals in float32; a GPU in bfloat16, and in float32 for the loss of
    dead latents, all of one SAE's pre-activations, its pairs, and sums over pieces of them.
    """
    if cpu:
        return 20 * hidden
    points = [(piece.latents, recipe.hook_points[piece.sae_id]) for piece in held]
    products = [latents for latents, point in points if product_pays(latents, hidden, point.k)]
    decoded = 2 * max(products) + 4 * hidden if products else 0
    candidates = max(min(activation_of(point.activation, point.k).candidates, latents) for latents, point in points)
    return decoded + 16 * hidden + 2 * max(latents for latents, _ in points) + candidates * (40 + hidden // 16)


def _position_bytes(recipe: Recipe, config: PretrainedConfig, width: int, fused_mixer: bool, cpu: bool) -> int:
    """Bytes per position of a language-model batch that live at once: caught streams and the widest part of a layer.

    Fitted to traced allocations of one layer of each kind, on a GPU fake ones (docs/plan.md). Without fused kernels
    DeltaNet works on float32 copies and on matrices of 64 x 64 positions per head. A GPU's kernels leave the experts a
    copy of each row for each of its experts, and what lies between their products.
    """
    hidden = int(config.hidden_size)
    heads = config_number(config, "linear_num_value_heads")
    value_dim = heads * config_number(config, "linear_value_head_dim")
    attention = config_number(config, "num_attention_heads", default=1)
    heads_dim = attention * config_number(config, "head_dim", default=hidden // attention)
    inner = config_number(config, "intermediate_size", default=4 * hidden)
    routed = config_number(config, "num_experts_per_tok")
    within = config_number(config, "moe_intermediate_size", default=inner)
    copies = (4 * routed + 1) * hidden if cpu else routed * (hidden + 3 * within) + hidden
    parts = (
        value_dim * 11 * width if fused_mixer and not cpu else value_dim * 44 + heads * 64 * 16,
        heads_dim * 7 * width,
        copies * width if routed else 3 * inner * width,
    )
    return (len(recipe.sites) + 3) * hidden * width + int(max(parts))


def _less(over: Callable[[Sequence[Change]], float], room: float, savings: Sequence[Change]) -> list[str]:
    """How much too much it is, and which of the `savings` make it fit, no more than it takes; no line where none do.

    `over`: bytes beyond the `room` with some changes.
    """
    advice = [f"{over(()) / GIB:.1f} GiB more than the {room / GIB:.1f} that a run can use"]
    for count in range(1, len(savings) + 1):
        changes = list(savings[:count])
        if over(changes) > 0:
            continue
        for earlier in reversed(changes[:-1]):
            if over(without := [other for other in changes if other != earlier]) <= 0:
                changes = without
        return [*advice, f"fits with {' '.join(f'--set {key}={str(value).lower()}' for key, value in changes)}"]
    return advice


def _elsewhere(needs: Mapping[str, int], room: float, width: int, card: Card) -> str:
    """Where a recipe fits that needs so much at least; an FP8 checkpoint only if it would: one byte a weight, on cards
    that multiply them.
    """
    eight_bit = sum(needs.values()) - needs["language_model"] * (width - 1) / width
    fp8 = ""
    if card.capability >= FP8_CAPABILITY and eight_bit <= room:
        fp8 = " or an FP8 checkpoint (which needs the kernels package, and the Hub when it runs)"
    return (
        f"too large for this card whatever is set: take a card with more memory{fp8}, or spread the model's layers "
        "over several cards (--set lm.device=cuda:0,cuda:1)"
    )


def _feeding(recipe: Recipe, gpus: int, over: Callable[[Sequence[Change]], float]) -> list[str]:
    """That a larger window, as far as one fits, has batches for all cards."""
    batches = batches_of(recipe, CARD).count
    if gpus == 1 or batches >= 3 * gpus:
        return []
    said = f"a window holds about {batches} language-model batches for {gpus} cards"
    step = recipe.activations.window_tokens
    wanted = largest = feeding(recipe, gpus, recipe.training.tokens).activations.window_tokens
    while largest > step and over([("activations.window_tokens", largest)]) > 0:
        largest -= step
    if largest <= step:
        return [f"{said}, and no larger one fits"]
    evenly = "evenly" if largest == wanted else "more evenly"
    return [f"{said}: --set activations.window_tokens={largest} shares them {evenly}"]


def feeding(recipe: Recipe, gpus: int, most: int) -> Recipe:
    """The recipe with so many times its window that each card finds three language-model batches, at most `most`."""
    step = recipe.activations.window_tokens
    while batches_of(recipe, CARD).count < 3 * gpus and (window := recipe.activations.window_tokens) < most:
        recipe = _changed(recipe, [("activations.window_tokens", min(most, window + step))])
    return recipe


def _less_often(recipe: Recipe, over: Callable[[Sequence[Change]], float]) -> list[str]:
    """That a larger window fits, in which a mixture's experts are read for fewer batches; windows are many, still."""
    change = "activations.window_tokens", LARGE_WINDOW
    if not recipe.activations.window_tokens < LARGE_WINDOW <= recipe.training.tokens // 8 or over([change]) > 0:
        return []
    larger = _changed(recipe, [change])
    now, then = (
        batches_of(one, CARD).count * (LARGE_WINDOW // one.activations.window_tokens) for one in (recipe, larger)
    )
    return [
        f"--set {change[0]}={LARGE_WINDOW} fits as well, and cuts as many tokens into {then} language-model batches "
        f"instead of {now}, each of which reads the experts' weights"
    ]


def _savings(recipe: Recipe, gpus: int) -> Iterator[Change]:
    """Less memory at little or no cost."""
    if (batch_tokens := max(recipe.corpus.max_length, 8192)) < recipe.corpus.batch_tokens:
        yield "corpus.batch_tokens", batch_tokens
    if recipe.activations.overlap:
        yield "activations.overlap", False
    window = recipe.activations.window_tokens
    if (half := max(recipe.training.batch_size, window // 2)) < window:
        yield "activations.window_tokens", half
    widest = max(point.dict_size for point in recipe.hook_points.values())
    share = max(64, -(-widest // (64 * gpus)) * 64)
    if gpus > 1 and share < min(widest, recipe.training.latents_per_rank or widest):
        yield "training.latents_per_rank", share
    if recipe.training.moments == "float32":
        yield "training.moments", "bfloat16"


def _changed(recipe: Recipe, changes: Sequence[Change]) -> Recipe:
    for key, value in changes:
        part, name = key.split(".")
        recipe = recipe.model_copy(update={part: getattr(recipe, part).model_copy(update={name: value})})
    return recipe
