"""From the recipe to one SAE's trainer, and to each rank's part of the harvest."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch

from qwenscope.costs import GPUS, position_seconds, size_of, step_seconds
from qwenscope.errors import RecipeError
from qwenscope.lm.model import LanguageModel, RowSource
from qwenscope.lm.sites import Site, hooked_sites, sites_of
from qwenscope.parallel.group import ALONE, Group
from qwenscope.parallel.harvest_plan import HarvestPlan
from qwenscope.parallel.owners import Piece, owners, shared
from qwenscope.parallel.shard import Shard
from qwenscope.recipe import Recipe
from qwenscope.sae.activation import ACTIVATIONS, TopK, described, trained
from qwenscope.sae.sae import SAE, random_directions
from qwenscope.sae.selection import Precision
from qwenscope.seeds import derive_seed
from qwenscope.training.sharded import ShardedTrainer
from qwenscope.training.trainer import SAETrainer


def check_activations(recipe: Recipe) -> None:
    """RecipeError naming the first SAE whose activation this version does not train."""
    for sae_id, point in recipe.hook_points.items():
        if point.target is not None:
            raise RecipeError(f"hook_points.{sae_id}.target: transcoders are opened, not trained; leave it out")
        if point.activation not in trained():
            raise RecipeError(
                f"hook_points.{sae_id}.activation: {point.activation!r} is not trained; choose one of "
                f"{', '.join(trained())}"
            )


def build_trainer(
    recipe: Recipe, lm: RowSource, sae_id: str, precision: Precision | Literal["auto"], shard: Shard | None = None
) -> SAETrainer:
    """The untrained SAE `sae_id`, or this rank's latents of it, on the language model's device, with everything the
    recipe says of its training.
    """
    point, training = recipe.hook_points[sae_id], recipe.training
    shard = shard or Shard((0, point.dict_size), point.k)
    sae = untrained(lm.width(Site(point.site)), shard, derive_seed(recipe.seed, "sae", sae_id), point.activation)
    sae = sae.to(lm.device)
    sae.config |= {
        "sae_id": sae_id,
        **Site(point.site).described(),
        "kind": lm.layer_kinds[point.layer],
        "model": lm.name,
        "model_revision": lm.revision,
        **({} if recipe.lm.model_b is None else {"model_b": recipe.lm.model_b}),
        "tokens": training.tokens,
    }
    trainer = SAETrainer if shard.group.size == 1 else partial(ShardedTrainer, shard=shard)
    return trainer(
        sae,
        point.lr,
        tokens=training.tokens,
        warmup_tokens=training.warmup_steps * training.batch_size,
        decay_share=training.decay_share,
        aux_coefficient=training.aux_coefficient,
        aux_k=training.aux_k,
        dead_after_tokens=training.dead_after_tokens,
        resample_every_steps=training.resample_every_steps,
        normalise=training.normalise,
        initial_decoder=training.initial_decoder,
        precision=precision,
        betas=training.betas,
        eps=training.eps,
        cautious=training.cautious,
        clip_norm=training.clip_norm,
        moments=getattr(torch, training.moments),
        seed=derive_seed(recipe.seed, "resampling", sae_id),
        prefixes=training.prefixes,
    )


def untrained(hidden_dim: int, shard: Shard, seed: int, activation: str = TopK.name) -> SAE:
    """The latents of `shard` of `SAE(hidden_dim, dict_size, k, activation, seed=seed)`, as an SAE of their own."""
    latents = shard.stop - shard.start
    decoder_ND = random_directions(hidden_dim, shard.dict_size, seed, shard.start, shard.stop)
    config = {"hidden_dim": hidden_dim, "dict_size": latents, "k": min(shard.k, latents)}
    weights = {
        "encoder.weight": decoder_ND.clone(),
        "encoder.bias": torch.zeros(latents, dtype=torch.float32),
        "decoder.weight": decoder_ND.T,
        "pre_bias": torch.zeros(hidden_dim, dtype=torch.float32),
    }
    if ACTIVATIONS[activation].has_threshold:
        weights["threshold"] = torch.zeros(latents, dtype=torch.float32)
    return SAE.of(config | described(activation), weights)


def plan_harvest(recipe: Recipe, lm: RowSource, group: Group) -> HarvestPlan[Site]:
    """Who needs which rows, and how busy each rank is with its SAEs: one with more to do there harvests less.

    Where steps exchange tensors too, GPUs take turns: two threads that use nccl side by side can lock each other out,
    when ranks meet their kernels in unlike order. Engines other than transformers work in one process and one thread.
    """
    if not isinstance(lm, LanguageModel):
        return HarvestPlan(ALONE, (sites_of(recipe),), (0.0,), in_turn=True)
    card = GPUS["h200"]  # only the ratio of harvesting to SAE steps matters, and only to who waits for whom
    size = size_of(lm.model, lm.model.config, lm.layer_kinds[: len(lm.layers)])
    position = sum(position_seconds(size, card, recipe.corpus.batch_tokens))
    steps = recipe.activations.window_tokens / recipe.training.batch_size
    owned, sites = owners(recipe, group.size), hooked_sites(recipe.hook_points)

    def seconds(piece: Piece) -> float:
        return sum(step_seconds(recipe, piece, lm.hidden_dim, card))

    return HarvestPlan(
        group,
        tuple(tuple(sorted({sites[piece.sae_id] for piece in held})) for held in owned),
        tuple(steps * sum(map(seconds, held)) / position for held in owned),
        in_turn=lm.device.type == "cuda" and shared(owned),
    )
