"""Conversations, and SAEs whose scores theory knows, for the tests of this room."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qwenscope.corpus.conversation import ROLES, Conversation
from qwenscope.lm.sites import Site
from qwenscope.recipe import Recipe
from qwenscope.sae.sae import TopKSAE

DIM, VOCABULARY, LAYERS = 16, 61, 8
LAYER_OF = {"sae_delta": 2, "sae_attn": 3, "sae_delta_late": 6}
SITE_OF = {sae_id: Site.of(layer) for sae_id, layer in LAYER_OF.items()}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY - 2)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"], "pad_token": "<a>"})
    return tokenizer


def conversation(length: int, seed: int, split: str = "chat") -> Conversation:
    random = np.random.default_rng(seed)
    token_ids = random.integers(0, VOCABULARY, length).astype(np.int32)
    return conversation_of(token_ids, seed, split, random.integers(0, len(ROLES), length).astype(np.uint8))


def conversation_of(
    token_ids: np.ndarray, number: int, split: str = "chat", roles: np.ndarray | None = None
) -> Conversation:
    """These tokens as a conversation; all of the first role unless `roles` says otherwise."""
    return Conversation(
        id=f"{number:016x}",
        source="files",
        split=split,
        token_ids=token_ids,
        roles=np.zeros(len(token_ids), dtype=np.uint8) if roles is None else roles,
        truncated=False,
        messages=[],
        tools=None,
        text="",
    )


def identity_sae(scale: float = 1.0) -> TopKSAE:
    """Reconstructs x as `scale` times x: the 2D latents are plus and minus each axis, all of them kept."""
    sae = TopKSAE(DIM, 2 * DIM, 2 * DIM, seed=0)
    axes = torch.cat([torch.eye(DIM), -torch.eye(DIM)])
    with torch.no_grad():
        sae.encoder.weight.copy_(scale * axes)
        sae.decoder.weight.copy_(axes.T)
    return sae


def constant_sae(value: torch.Tensor | None = None) -> TopKSAE:
    """Reconstructs every row as `value` (zero by default): no latent ever fires."""
    sae = identity_sae(0.0)
    with torch.no_grad():
        sae.pre_bias.copy_(torch.zeros(DIM) if value is None else value)
    return sae


def with_rows_left_out(recipe: Recipe) -> Recipe:
    activations = recipe.activations.model_copy(update={"skip_first_position": True})
    return recipe.model_copy(update={"activations": activations})
