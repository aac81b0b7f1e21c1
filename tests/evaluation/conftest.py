"""A tiny random Qwen3.5-MoE in memory, and conversations and a recipe for it."""

from __future__ import annotations

import pytest
import torch
from evaluation_cases import DIM, LAYER_OF, LAYERS, VOCABULARY, conversation, tiny_tokenizer
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from qwenscope.corpus.conversation import Conversation
from qwenscope.lm.load import layer_kinds
from qwenscope.lm.model import LanguageModel
from qwenscope.recipe import Recipe


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    """Eight random layers in float32: DeltaNet thrice, attention once, and again; 8 experts, 2 per token."""
    config = Qwen3_5MoeTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3_5MoeForCausalLM(config).eval().requires_grad_(False)
    return LanguageModel(
        model=model,
        tokenizer=tiny_tokenizer(),
        layers=list(model.model.layers),
        layer_kinds=layer_kinds(config),
        hidden_dim=DIM,
        device=torch.device("cpu"),
        dtype=torch.float32,
        name="tiny",
        revision=None,
    )


@pytest.fixture(scope="session")
def conversations() -> list[Conversation]:
    return [conversation(length, seed) for seed, length in enumerate([9, 30, 2, 17, 40, 1, 25, 30, 12, 6])]


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    hook_points = {
        sae_id: {"layer": layer, "kind": kind, "dict_size": 2 * DIM, "k": 2 * DIM, "lr": 1e-3}
        for (sae_id, layer), kind in zip(LAYER_OF.items(), ("deltanet", "attention", "deltanet"), strict=True)
    }
    return Recipe.model_validate(
        {
            "lm": {"model": "tiny"},
            "hook_points": hook_points,
            "corpus": {"max_length": 64, "batch_tokens": 128, "sources": [{"name": "tool_use", "weight": 1.0}]},
            "activations": {"window_tokens": 100, "outlier_factor": None},
            "training": {"tokens": 1000, "batch_size": 10, "warmup_steps": 1},
        }
    )
