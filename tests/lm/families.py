"""Tiny random models of many families, by transformers' own configurations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64,
}  # fmt: skip
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_PLAIN = """
    llama mistral qwen2 qwen3 phi phi3 gemma gemma2 gemma3_text olmo olmo2 olmo3 stablelm starcoder2 smollm3 ernie4_5
    exaone4 seed_oss apertus bitnet granite cohere cohere2 helium glm glm4 nanochat arcee persimmon gpt_neox bloom opt
    biogpt xglm recurrent_gemma modernbert-decoder openai-gpt ctrl hunyuan_v1_dense nemotron mamba
"""
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN.split()},
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "jetmoe"), _EXPERTS),
    "qwen3_next": {**_EXPERTS, **_DELTA, **_HYBRID},
    "qwen3_5_moe_text": {**_EXPERTS, **_DELTA, **_HYBRID},
    "qwen3_5_text": {**_DELTA, **_HYBRID},
    "olmo_hybrid": {**_DELTA, **_HYBRID},
    "llama4_text": {**_EXPERTS, "intermediate_size_mlp": 64},
    "minimax": {**_EXPERTS, **_HYBRID},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_EXPERTS, **_MAMBA, "layer_types": ["mamba", "attention", "mamba"], "logits_scaling": 3.0,
        "shared_intermediate_size": 32,
    },
    "falcon_h1": {**_MAMBA, "lm_head_multiplier": 0.3, "embedding_multiplier": 2.0},
    "jamba": {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "falcon": {"head_dim": ...},
    "diffllama": {"num_key_value_heads": 2},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 4, "num_attention_heads": 4, "head_dim": ...},
    "gpt2": {"n_positions": 64},
    "gpt_bigcode": {"n_positions": 64},
    "gpt_neo": {"num_layers": 3, "attention_types": [[["global", "local", "global"], 1]], "num_heads": 2},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 3, "max_seq_len": 64},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "xlstm": {"num_heads": 2, "chunk_size": 8, "qk_dim_factor": 2.0, "v_dim_factor": 2.0},
    "nemotron_h": {
        **_EXPERTS, "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
    },
    "deepseek_v3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "num_key_value_heads": 2, "head_dim": 8,
    },
    "glm4_moe": {**_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "minicpm3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "dim_model_base": 16, "num_key_value_heads": 2,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "intermediate_size": [64, 64, 64], "activation_sparsity_pattern": [0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "global_head_dim": 16,
    },
}  # fmt: skip


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """A random model of a family, seeded by its name, in float32 and eval mode; `changes` to its configuration."""
    torch.manual_seed(sum(name.encode()))
    sizes = {key: value for key, value in {**_SIZES, **FAMILIES[name], **changes}.items() if value is not ...}
    config = AutoConfig.for_model(name, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
