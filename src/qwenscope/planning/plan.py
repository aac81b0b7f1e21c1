"""What a recipe needs and how long it takes, before anyone rents a machine.

Parts are priced by `costs`, or by what `measure` found on the device at hand. For a card that is not here,
the rates are stated shares of the data sheet's peaks, a cautious and an optimistic one at the ends of each range. The
language model is built on the meta device, so its parameters are counted, not guessed. `docs/plan.md` compares plans
with measurements.

Several cards (`torchrun`): each runs some of a window's language-model batches and owns some of the SAEs, to which rows
travel. A card with more SAE steps to do harvests less, so time is evened out as far as whole batches and the card with
the most SAEs allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, Qwen3_5MoeTextConfig

from qwenscope.costs import (
    GPUS,
    NETWORK_GB_S,
    Card,
    ModelSize,
    Range,
    bytes_moved,
    exchange_seconds,
    find_card,
    link_bytes,
    named_card,
    position_seconds,
    shard_bytes,
    size_of,
    step_seconds,
    trained_bytes,
)
from qwenscope.errors import ModelError
from qwenscope.lm.load import check_hook_points, layer_kinds, load_config, pick_dtype
from qwenscope.lm.model import Kind, cut_config
from qwenscope.parallel.owners import Piece, owners
from qwenscope.planning.measure import Measured, batches_of
from qwenscope.planning.memory import CARD, GIB, Held, fitting, row_bytes
from qwenscope.recipe import Recipe
from qwenscope.training.building import check_activations
from qwenscope.training.closing import check_closing

_AROUND: Range = (1.1, 0.95)  # of measured times: gathers, logs and checkpoints come on top of them
_FLOAT32_SHARE = 1 / 16  # of a card's bf16 rate
_LOAD_SECONDS: Range = (1.5, 0.5)  # config, tokenizer, building; a probe of the model; the folder
_READ_BYTES: Range = (5e8, 3e9)  # per second, of weights on a disk
_SAVE_SECONDS: Range = (0.5, 0.1)
_WRITE_BYTES: Range = (2e8, 1e9)  # with their checksums


def plan(
    recipe: Recipe, gpu: str = "h200", gpus: int = 1, tokens: int | None = None, measured: Measured | None = None
) -> dict[str, Any]:
    """Memory, speed, time and cost of a recipe as one JSON-able object.

    Args:
        recipe: What to train.
        gpu: A name of `GPUS`; with `measured`, of no account.
        gpus: Cards; each runs the language model on its own conversations and owns its share of the SAEs.
        tokens: Length of the run; None takes the recipe's.
        measured: What `measure` found for this recipe on the device at hand: plan for devices like it.

    Returns:
        gpu, gpus, tokens; measured {product_tflops, traffic_tb_s, lm_share of the product rate} or None;
        model {layers, parameters, active_parameters, flops_per_token}; owners [[sae_id, ...] per card];
        seconds_per_step of one batch of `training.batch_size` rows, each [cautious, optimistic]: language_model and
        saes of all cards together, saes_of_busiest_card, exchange, corpus, and step, what it takes from end to end;
        seconds_once likewise: load_model, calibration, part_windows (rows harvested in vain at the end, and what runs
        alone where harvest and steps overlap), last_save, and with `training.kl_share` closing_phase (what that takes
        beyond the steps); hours include them;
        bytes_per_step, sent by all cards together; tokens_per_second [cautious, optimistic]; hours and cost_usd
        [optimistic, cautious] (cost null where no price is known); and what `fitting` says of memory.

    Raises:
        RecipeError: unknown card, an activation that is not trained, or a closing phase that cannot be.
        ModelError: the model's config is not to be had, or lacks a hook point.
    """
    name, card = find_card(gpu) if measured is None else (measured.device, _card_like(measured))
    check_activations(recipe)
    check_closing(recipe, gpus)
    config = read_config(recipe)
    size = _of_both(model_size(config, recipe.last_layer + 1), recipe)
    held = owners(recipe, gpus)
    parts = _Parts(recipe, config, size, card, held, measured)
    seconds = parts.per_step()
    length = tokens or recipe.training.tokens
    once = parts.once(length, seconds)
    rates = [recipe.training.batch_size / value for value in seconds["step"]]
    hours = [(length / rates[end] + sum(part[end] for part in once.values())) / 3600 for end in (1, 0)]
    process = measured.process_bytes if measured and measured.device == "cpu" else None
    cost = [h * gpus * price for h, price in zip(hours, card.usd_per_hour, strict=True)] if card.usd_per_hour else None
    return {
        "gpu": name,
        "gpus": gpus,
        "tokens": length,
        "measured": None if measured is None else _rates(measured, recipe, config, size),
        "model": asdict(size),
        "owners": [[piece.stem for piece in pieces] for pieces in held],
        "seconds_per_step": seconds,
        "seconds_once": once,
        "bytes_per_step": bytes_moved(recipe, held, config.hidden_size, row_bytes(recipe, config)),
        "tokens_per_second": [round(rate) for rate in rates],
        "hours": [round(value, 4) for value in hours],
        "cost_usd": cost and [round(value, 2) for value in cost],
        **fitting(recipe, config, parts.loaded, gpus, card, process, measured is None or measured.fused_mixer),
    }


def _of_both(size: ModelSize, recipe: Recipe) -> ModelSize:
    """A second model of the recipe is as large as the first, and reads the same tokens."""
    if recipe.lm.model_b is None:
        return size
    twice = ("parameters", "active_parameters", "flops_per_token", "expert_products")
    return replace(size, **{name: 2 * getattr(size, name) for name in twice})


def _passed(recipe: Recipe, config: PretrainedConfig) -> tuple[Kind, ...]:
    """The kinds of all layers that a token passes, in a recipe of two models in both."""
    return layer_kinds(config)[: recipe.last_layer + 1] * (1 if recipe.lm.model_b is None else 2)


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
class _Parts:
    """What the parts of a run take, each (cautious, optimistic), by the roofline or from measured times."""

    recipe: Recipe
    config: PretrainedConfig
    size: ModelSize
    card: Card
    held: Held
    measured: Measured | None

    def per_step(self) -> dict[str, Range]:
        """Seconds per batch of `training.batch_size` rows."""
        recipe, measured = self.recipe, self.measured
        if measured is None:
            batches = batches_of(recipe, CARD)
            padding, position = batches.padding, position_seconds(self.size, self.card, math.prod(batches.shape))
        else:
            padding = measured.batches.padding
            position = _around(measured.lm_seconds(_passed(recipe, self.config)))
        saes = [_sum(self._piece_seconds(piece) for piece in pieces) for pieces in self.held]
        corpus = recipe.training.batch_size * (measured.corpus_seconds if measured else 0.0)
        seconds = {
            "language_model": _times(position, recipe.training.batch_size * padding),
            "saes": _sum(saes),
            "saes_of_busiest_card": (max(cautious for cautious, _ in saes), max(optimistic for _, optimistic in saes)),
            "exchange": exchange_seconds(recipe, self.held, row_bytes(recipe, self.config), self.card),
            "corpus": (corpus, corpus),
        }
        return seconds | {"step": (self._end_to_end(seconds, 0), self._end_to_end(seconds, 1))}

    def once(self, tokens: int, seconds: Mapping[str, Range]) -> dict[str, Range]:
        """Seconds of what a run of `tokens` does once, before its first step, after its last, or in part windows."""
        recipe, window = self.recipe, self.recipe.activations.window_tokens
        read = self.loaded * pick_dtype(recipe.lm, self.config).itemsize
        saved = max(sum(self._trained_bytes(piece) for piece in pieces) for pieces in self.held)
        batch = recipe.training.batch_size
        harvest = _sum([_times(seconds["language_model"], 1 / len(self.held)), seconds["corpus"]])
        unused = _times(harvest, (-tokens % window) / batch)  # the last window is harvested whole
        steps = seconds["saes_of_busiest_card"]
        shorter = (min(steps[0], harvest[0]), min(steps[1], harvest[1]))
        alone = _times(shorter, min(tokens, window) / batch if self._side_by_side else 0.0)  # nothing runs beside it
        once = {
            "load_model": (_LOAD_SECONDS[0] + read / _READ_BYTES[0], _LOAD_SECONDS[1] + read / _READ_BYTES[1]),
            "calibration": self._calibration(),
            "part_windows": _sum([unused, alone]),
            "last_save": (_SAVE_SECONDS[0] + saved / _WRITE_BYTES[0], _SAVE_SECONDS[1] + saved / _WRITE_BYTES[1]),
        }
        if recipe.training.closes:
            share = recipe.training.kl_share
            times = self._closing_flops() / self.size.flops_per_token
            once["closing_phase"] = _times(seconds["language_model"], times * share * tokens / batch)
        return once

    @property
    def loaded(self) -> int:
        """Parameters of the language model: up to the last hook point, and of all of it where SAEs are spliced in."""
        if not self.recipe.training.closes:
            return self.size.parameters
        head = 0 if self.config.tie_word_embeddings else self._head
        return model_size(self.config, self.config.num_hidden_layers).parameters + head

    @property
    def _head(self) -> int:
        return int(self.config.vocab_size * self.config.hidden_size)

    def _closing_flops(self) -> float:
        """Of a token of the closing phase, beyond those of the truncated forward: the rest of the clean pass; for each
        SAE the layers above it once forwards and once back, and the LM head three times.
        """
        layers = int(self.config.num_hidden_layers)
        whole = model_size(self.config, layers).flops_per_token
        above = sum(layers - 1 - point.layer for point in self.recipe.hook_points.values()) / layers
        heads = 3 * len(self.recipe.hook_points) * 2 * self._head
        return whole - self.size.flops_per_token + 2 * above * whole + heads

    @property
    def batches(self) -> int:
        """Of the language model, per window."""
        return self.measured.batches.count if self.measured else batches_of(self.recipe, CARD).count

    @property
    def _side_by_side(self) -> bool:
        """Whether a window is harvested while SAEs train on the one before, at no cost to either: on spare cores. On
        one GPU both share what there is.
        """
        spare = self.measured is not None and self.measured.lanes >= 2 * len(self.held)
        return self.recipe.activations.overlap and spare

    def _end_to_end(self, seconds: Mapping[str, Range], end: int) -> float:
        """One step: all work shared evenly, but nobody does less than one whole batch or its own SAEs.

        The cautious end lets every card wait for one more batch (the bound of dealing the largest first).
        """
        cards = len(self.held)
        forward, steps, busiest, exchange, corpus = (
            seconds[part][end] for part in ("language_model", "saes", "saes_of_busiest_card", "exchange", "corpus")
        )
        one_batch = forward / self.batches
        even = (forward if self._side_by_side else forward + steps) / cards
        even = max(even, one_batch) if end else even + one_batch * (1 - 1 / cards)
        if self._side_by_side:
            return max(even + exchange + corpus, busiest)
        return max(even, busiest) + exchange + corpus

    def _piece_seconds(self, piece: Piece) -> Range:
        """One step of a piece of an SAE."""
        if self.measured is None:
            return step_seconds(self.recipe, piece, self.config.hidden_size, self.card)
        dead, alive = self.measured.step_seconds[piece.sae_id]
        share = piece.latents / piece.dict_size
        exchange = shard_bytes(self.recipe, piece, self.config.hidden_size) / link_bytes(self.card, round(1 / share))
        return dead * share * _AROUND[0] + exchange, alive * share * _AROUND[1] + exchange

    def _calibration(self) -> Range:
        """Of the card that owns the most."""
        rows = min(self.recipe.training.calibration_tokens, self.recipe.activations.window_tokens)
        if self.measured is None:
            latents = max(sum(piece.latents for piece in pieces) for pieces in self.held)
            flops = 2 * rows * latents * self.config.hidden_size
            return _times((4.0, 1.0), flops / (self.card.bf16_tflops * 1e12 * _FLOAT32_SHARE))
        per_row = self.measured.calibration_seconds
        return _around(
            rows * max(sum(per_row[p.sae_id] * p.latents / p.dict_size for p in pieces) for pieces in self.held)
        )

    def _trained_bytes(self, piece: Piece) -> int:
        return trained_bytes(self.recipe, piece.latents, self.config.hidden_size)


def model_size(config: PretrainedConfig, layers: int) -> ModelSize:
    """Of the first `layers` layers, built on the meta device."""
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(cut_config(config, layers))  # type: ignore[no-untyped-call]
    return size_of(model, config, layer_kinds(config)[:layers])


def _around(seconds: float) -> Range:
    return _times(_AROUND, seconds)


def _times(seconds: Range, factor: float) -> Range:
    return seconds[0] * factor, seconds[1] * factor


def _sum(parts: Iterable[Range]) -> Range:
    cautious, optimistic = zip((0.0, 0.0), *parts, strict=True)
    return sum(cautious), sum(optimistic)


def _card_like(measured: Measured) -> Card:
    """Measured memory and rates; links and price are the data sheet's where the name is a known one's."""
    known = GPUS.get(named_card(measured.device) or "")
    return Card(
        measured.capability,
        measured.memory_bytes / GIB,
        measured.product_tflops,
        measured.traffic_tb_s,
        known.link_gb_s if known else NETWORK_GB_S,
        known.usd_per_hour if known else None,
    )


def _rates(measured: Measured, recipe: Recipe, config: PretrainedConfig, size: ModelSize) -> dict[str, float]:
    seconds = measured.lm_seconds(_passed(recipe, config))
    return {
        "product_tflops": measured.product_tflops,
        "traffic_tb_s": measured.traffic_tb_s,
        "lm_share": size.flops_per_token / seconds / 1e12 / measured.product_tflops,
    }
