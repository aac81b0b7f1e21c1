"""From the recipe to one SAE's trainer."""

from __future__ import annotations

from typing import Literal

import torch

from qwenscope.lm.model import RowSource
from qwenscope.lm.sites import Site
from qwenscope.recipe import Recipe
from qwenscope.sae.selection import Precision
from qwenscope.sae.topk import TopKSAE, random_directions
from qwenscope.seeds import derive_seed
from qwenscope.training.shards import Shard
from qwenscope.training.trainer import SAETrainer


def build_trainer(
    recipe: Recipe, lm: RowSource, sae_id: str, precision: Precision | Literal["auto"], shard: Shard | None = None
) -> SAETrainer:
    """The untrained SAE `sae_id`, or this rank's latents of it, on the language model's device, with everything the
    recipe says of its training.
    """
    point, training = recipe.hook_points[sae_id], recipe.training
    shard = shard or Shard((0, point.dict_size), point.k)
    sae = untrained(lm.hidden_dim, shard, derive_seed(recipe.seed, "sae", sae_id)).to(lm.device)
    sae.config |= {
        "sae_id": sae_id,
        **Site(point.site).described(),
        "kind": lm.layer_kinds[point.layer],
        "model": lm.name,
        "model_revision": lm.revision,
        "tokens": training.tokens,
    }
    return SAETrainer(
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
        precision=precision,
        betas=training.betas,
        eps=training.eps,
        clip_norm=training.clip_norm,
        moments=getattr(torch, training.moments),
        seed=derive_seed(recipe.seed, "resampling", sae_id),
        shard=shard,
    )


def untrained(hidden_dim: int, shard: Shard, seed: int) -> TopKSAE:
    """The latents of `shard` of `TopKSAE(hidden_dim, dict_size, k, seed=seed)`, as an SAE of their own."""
    latents = shard.stop - shard.start
    decoder_ND = random_directions(hidden_dim, shard.dict_size, seed, shard.start, shard.stop)
    return TopKSAE.of(
        {"hidden_dim": hidden_dim, "dict_size": latents, "k": min(shard.k, latents)},
        {
            "encoder.weight": decoder_ND.clone(),
            "encoder.bias": torch.zeros(latents),
            "decoder.weight": decoder_ND.T,
            "pre_bias": torch.zeros(hidden_dim),
        },
    )
