"""What the parts of a run cost on a card: seconds, bytes of memory, bytes sent.

A roofline: a part's time is its products at the card's product rate plus its memory traffic at the card's bandwidth.
`planning` adds the parts up before anyone rents a machine; a run on several devices weighs them against one another.
docs/plan.md has the formulas, and where their constants come from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from qwenscope.errors import RecipeError
from qwenscope.lm.model import config_number
from qwenscope.machine import GROUPED_PRODUCTS
from qwenscope.recipe import Recipe

Range = tuple[float, float]
"""(cautious, optimistic)"""


class Part(Protocol):
    """An SAE, or those of its latents that one card holds."""

    @property
    def sae_id(self) -> str:
        """Which SAE."""

    @property
    def dict_size(self) -> int:
        """Latents of the whole SAE."""

    @property
    def latents(self) -> int:
        """Latents held here."""


@dataclass(frozen=True)
class Card:
    """Peaks of one card, from its data sheet or measured.

    capability: its compute capability. link_gb_s: to the other cards of its machine, one direction. usd_per_hour: span
    of on-demand prices seen in 2026, for orientation; None where nothing is known.
    """

    capability: tuple[int, int]
    memory_gib: float
    bf16_tflops: float
    bandwidth_tb_s: float
    link_gb_s: float
    usd_per_hour: Range | None


GPUS: dict[str, Card] = {
    "h200": Card((9, 0), 140, 989, 4.8, 450, (2.3, 5.0)),
    "h100": Card((9, 0), 79.6, 989, 3.35, 450, (1.8, 4.0)),
    "b200": Card((10, 0), 179, 2250, 8.0, 900, (3.8, 7.0)),
    "a100": Card((8, 0), 79.2, 312, 2.0, 300, (1.1, 2.5)),
    "l40s": Card((8, 9), 45, 362, 0.86, 32, (0.8, 1.9)),
    "4090": Card((8, 9), 24, 165, 1.0, 32, (0.3, 0.7)),
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # as families call their number
_STATE = ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
NETWORK_GB_S = 50.0
"""Between machines: one adapter of 400 Gbit/s per card."""

# Shares of peak: the language model's many small expert products, one large product, memory traffic, links.
_LM_SHARE: Range = (0.25, 0.45)
_PRODUCT_SHARE: Range = (0.65, 0.85)
_TRAFFIC_SHARE: Range = (0.55, 0.85)
_LINK_SHARE: Range = (0.4, 0.8)
_PRODUCT_SECONDS: Range = (6e-6, 2e-6)  # to launch one expert's small product, and its part of waiting for the device
_MACHINE = 8  # cards that share fast links


def find_card(gpu: str) -> tuple[str, Card]:
    """The name in `GPUS` and the card that `gpu` means, as nvidia-smi, torch or a person writes it: RTX4090, say, or
    A100-SXM4-80GB.

    Raises:
        RecipeError: it is not one of `GPUS`.
    """
    if (name := named_card(gpu)) is None:
        raise RecipeError(f"--gpu {gpu} is unknown; one of {', '.join(GPUS)}")
    return name, GPUS[name]


def named_card(text: str) -> str | None:
    """The name in `GPUS` that stands in `text`; None where it says another card, or other memory than that one's."""
    words = re.findall(r"[a-z]*\d+[a-z]*", text.lower())
    found = [name for name in GPUS if any(word in (name, f"rtx{name}", f"rtx{name}d") for word in words)]
    sizes = [int(word[:-2]) for word in words if re.fullmatch(r"\d+gb", word)]
    if len(found) != 1 or any(abs(size - GPUS[found[0]].memory_gib) > 0.1 * size for size in sizes):
        return None
    return found[0]


# -- the language model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSize:
    """Of the truncated language model without LM head."""

    layers: int
    parameters: int
    active_parameters: int
    flops_per_token: int
    expert_products: int
    """Of one pass, where every expert has products of its own."""


def size_of(model: nn.Module, config: Any, kinds: Sequence[str | None]) -> ModelSize:
    """Count a model of transformers' `config` with layers of `kinds`.

    2 FLOPs per active weight and token, plus the mixers' state. Of a mixture of experts only the routed share is
    active; embeddings are looked up, not multiplied. The length-dependent part of attention is left out: below 1 % at
    2,048 tokens.
    """
    experts = config_number(config, *EXPERTS)
    routed = min(1.0, config_number(config, "num_experts_per_tok", default=1) / experts) if experts else 1.0
    parameters = active = 0.0
    mixtures = set()
    for name, weight in model.named_parameters():
        parameters += weight.numel()
        if ".experts." in name:
            mixtures.add(name.partition(".experts.")[0])
        if weight.ndim >= 2 and "embed" not in name:
            active += weight.numel() * (routed if ".experts." in name else 1)
    state = math.prod(config_number(config, name) for name in _STATE)
    flops = 2 * active + 8 * kinds.count("deltanet") * state
    return ModelSize(len(kinds), int(parameters), int(active), int(flops), 2 * experts * len(mixtures))


def position_seconds(size: ModelSize, card: Card, positions: int) -> Range:
    """The truncated forward, per position of a batch of so many; its weights are read once a batch, in bfloat16, at the
    cautious end before anything is multiplied, at the optimistic one meanwhile.

    A card without grouped products launches those of each expert one after the other.
    """
    products = 0 if card.capability[0] in GROUPED_PRODUCTS else size.expert_products
    weights = 2 * size.parameters / (card.bandwidth_tb_s * 1e12 * _TRAFFIC_SHARE[0]), 0.0
    cautious, optimistic = (
        size.flops_per_token / (card.bf16_tflops * 1e12 * share) + (products * seconds + read) / positions
        for share, seconds, read in zip(_LM_SHARE, _PRODUCT_SECONDS, weights, strict=True)
    )
    return cautious, optimistic


# -- SAEs -------------------------------------------------------------------------------------------------------------


def step_seconds(recipe: Recipe, part: Part, hidden: int, card: Card) -> Range:
    """One sparse step of an SAE, or of a card's latents of it: the encoder product, traffic of selection, gathers (of
    the decoder's rows twice, of the batch's and the residual's for the gradient) and optimizer, and what the cards that
    share it tell one another (the cautious end: while latents are dead).
    """
    batch, held, point = recipe.training.batch_size, part.latents, recipe.hook_points[part.sae_id]
    product = 2 * batch * hidden * held
    preactivations = 2 * batch * held * 2
    gathers = 4 * batch * min(point.k, held) * hidden * 2
    optimizer = 2 * held * hidden * (2 * 4 + 4 * _moment_bytes(recipe) + 2)
    traffic = preactivations + gathers + optimizer
    link = link_bytes(card, round(part.dict_size / held))
    sent = [shard_bytes(recipe, part, hidden, dead) / link for dead in (True, False)]
    cautious, optimistic = (
        product / (card.bf16_tflops * 1e12 * products)
        + traffic / (card.bandwidth_tb_s * 1e12 * bandwidth)
        + bytes_sent / share
        for products, bandwidth, bytes_sent, share in zip(
            _PRODUCT_SHARE, _TRAFFIC_SHARE, sent, _LINK_SHARE, strict=True
        )
    )
    return cautious, optimistic


def shard_bytes(recipe: Recipe, part: Part, hidden: int, dead: bool = False) -> float:
    """Bytes that a card with part of an SAE sends per step: its k largest to each other one, its part of x_hat; the
    same for the dead-latent loss while latents are `dead`, in bfloat16.
    """
    shards, training = part.dict_size / part.latents, recipe.training
    largest = 4 * recipe.hook_points[part.sae_id].k + (2 * (training.aux_k or hidden // 2) if dead else 0)
    summed = 4 * hidden * (1 + dead)
    return training.batch_size * (shards - 1) * (largest + 2 / shards * summed)


def trained_bytes(recipe: Recipe, latents: int, hidden: int) -> int:
    """Both matrices of that many latents with their moments: what a checkpoint holds."""
    return 2 * latents * hidden * (4 + 2 * _moment_bytes(recipe))


def _moment_bytes(recipe: Recipe) -> int:
    return 4 if recipe.training.moments == "float32" else 2


# -- rows on their way ------------------------------------------------------------------------------------------------


def sites_held(recipe: Recipe, held: Sequence[Part]) -> set[str]:
    """Hooked sites whose rows a card needs for what it holds."""
    return {recipe.hook_points[part.sae_id].site for part in held}


def bytes_moved(recipe: Recipe, held: Sequence[Sequence[Part]], hidden: int, row_bytes: int) -> int:
    """Bytes that all cards together send per step: rows that their owner did not harvest, four bytes per token and hook
    point to everyone else (the norms that decide which rows are left out), and what ranks that share an SAE say.
    """
    norms = 4 * recipe.training.batch_size * len(recipe.sites) * (len(held) - 1)
    shards = sum(shard_bytes(recipe, part, hidden) for parts in held for part in parts)
    return norms + sum(_received(recipe, parts, len(held), row_bytes) for parts in held) + round(shards)


def exchange_seconds(recipe: Recipe, held: Sequence[Sequence[Part]], row_bytes: int, card: Card) -> Range:
    """Until the card that receives the most rows has them."""
    busiest = max(_received(recipe, parts, len(held), row_bytes) for parts in held)
    cautious, optimistic = (busiest / (link_bytes(card, len(held)) * share) for share in _LINK_SHARE)
    return cautious, optimistic


def link_bytes(card: Card, cards: int) -> float:
    """Per second, one direction, among so many cards: of one machine, or of several."""
    return 1e9 * (card.link_gb_s if cards <= _MACHINE else min(card.link_gb_s, NETWORK_GB_S))


def _received(recipe: Recipe, held: Sequence[Part], cards: int, row_bytes: int) -> int:
    return len(sites_held(recipe, held)) * (recipe.training.batch_size * (cards - 1) // cards) * row_bytes
