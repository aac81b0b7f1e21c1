"""Tiny random language models on disk, one per family, made once per test session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
)

VOCABULARY = 96
LAYERS = 8
QWEN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.05,  # layers and tokens differ, and yet rounding is not blown up as by wilder random weights
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
DENSE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "initializer_range": 0.05,
}


def text_model() -> PreTrainedModel:
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**QWEN))


def multimodal_model() -> PreTrainedModel:
    return Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=QWEN, vision_config=VISION))


def llama_model() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**DENSE, num_key_value_heads=1))


def gemma_model() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**DENSE, num_key_value_heads=1, head_dim=16, sliding_window=8))


def neox_model() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**DENSE))


FAMILIES = {
    "text": text_model,
    "multimodal": multimodal_model,
    "llama": llama_model,
    "gemma": gemma_model,
    "neox": neox_model,
}


def save(name: str, folder: Path, **options: Any) -> PreTrainedModel:
    """Write the family's model (seeded by its name) and a tokenizer to `folder`; return the model, in eval mode."""
    torch.manual_seed(sum(name.encode()))
    model = FAMILIES[name]().eval()
    model.save_pretrained(folder, **options)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer over w0, w1, ...: as small as a tokenizer can be."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)
