"""The stand-in's network: its configuration, growth by repeating blocks, the forward pass of training, figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as modeling
from standin.data import NgramTables, Rows, pad_rows
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

NEIGHBOURS = ((6, 7), (14, 15), (21, 22), (22, 23), (34, 35))
"""Pairs of hooked layers (residual stream after the layer) whose similarity the description reports."""


def standin_config(vocab_size: int, **overrides: Any) -> Qwen3_5MoeTextConfig:
    """The stand-in's configuration: 40 layers, hidden size 64, 8 experts of which 2 are routed, tied embeddings."""
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "num_hidden_layers": 40,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "tie_word_embeddings": True,
        "initializer_range": 0.125,
        "router_aux_loss_coef": 0.01,
    }
    return Qwen3_5MoeTextConfig(**(values | overrides))


def new_model(config: Qwen3_5MoeTextConfig, layers: int) -> Qwen3_5MoeForCausalLM:
    """Random weights for `layers` layers; decay rates of the DeltaNet layers as in Mamba-2 (Dao and Gu 2024)."""
    model = Qwen3_5MoeForCausalLM(_with_layers(config, layers))
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in _outputs(layer):
                projection.mul_(0.5)
            if layer.block_type == "linear_attention":
                heads = layer.linear_attn.num_v_heads
                step = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)))
                layer.linear_attn.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
                layer.linear_attn.A_log.copy_(torch.empty(heads).uniform_(1, 8).log())
    return model


def grow(model: Qwen3_5MoeForCausalLM, layers: int) -> Qwen3_5MoeForCausalLM:
    """A deeper copy: each block of four layers stands several times in a row, its outputs divided by that number."""
    old, new = model.config.num_hidden_layers // 4, layers // 4
    source = [block * old // new for block in range(new)]
    deeper = Qwen3_5MoeForCausalLM(_with_layers(model.config, layers))
    deeper.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deeper.model.norm.load_state_dict(model.model.norm.state_dict())
    with torch.no_grad():
        for i, layer in enumerate(deeper.model.layers):
            layer.load_state_dict(model.model.layers[4 * source[i // 4] + i % 4].state_dict())
            for projection in _outputs(layer):
                projection.div_(source.count(source[i // 4]))
    return deeper


def _with_layers(config: Qwen3_5MoeTextConfig, layers: int) -> Qwen3_5MoeTextConfig:
    values = config.to_dict()
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
    return Qwen3_5MoeTextConfig(**(values | {"num_hidden_layers": layers, "layer_types": kinds}))


def _outputs(layer: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The parameters that write to the residual stream."""
    for name, parameter in layer.named_parameters():
        if name.endswith(("out_proj.weight", "o_proj.weight", "experts.down_proj", "shared_expert.down_proj.weight")):
            yield parameter


def forward(model: Qwen3_5MoeForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Next-token losses [number of predicted tokens] in nats, and the decoder's output with all streams and routers."""
    with _short_chunks():
        output = model.model(ids, use_cache=False, output_hidden_states=True, output_router_logits=True)
    predicted = mask[:, 1:]
    hidden, targets = output.last_hidden_state[:, :-1][predicted], ids[:, 1:][predicted]
    pairs = zip(torch.split(hidden, 256), torch.split(targets, 256), strict=True)  # logits of 256 tokens fit the cache
    return torch.cat([F.cross_entropy(model.lm_head(h), y, reduction="none") for h, y in pairs]), output


@contextmanager
def _short_chunks() -> Iterator[None]:
    """Run DeltaNet in chunks of 16 instead of 64 positions: the same result, 1.3 times faster with heads this small."""
    original = modeling.torch_chunk_gated_delta_rule
    modeling.torch_chunk_gated_delta_rule = lambda *args, **kwargs: original(*args, **(kwargs | {"chunk_size": 16}))
    try:
        yield
    finally:
        modeling.torch_chunk_gated_delta_rule = original


def imbalance(routers: tuple[torch.Tensor, ...], mask: torch.Tensor, active: int) -> torch.Tensor:
    """Load-balancing loss per layer, averaged; 1 when every expert is used alike (Fedus et al. 2021, eq. 4)."""
    probabilities = torch.stack(list(routers))[:, mask.flatten()].softmax(-1)
    return (_use(probabilities, active) * probabilities.mean(1)).sum(-1).mean() * probabilities.shape[-1]


def _use(probabilities: torch.Tensor, active: int) -> torch.Tensor:
    """Share of routed (token, slot) pairs per expert [layers, experts] from probabilities [layers, tokens, experts]."""
    chosen = probabilities.topk(active, dim=-1).indices
    return F.one_hot(chosen, probabilities.shape[-1]).float().mean((1, 2))


def centered_cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the cosine between rows of x and y [..., tokens, D], each minus its mean over tokens."""
    return F.cosine_similarity(x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True), dim=-1).mean(-1)


@torch.no_grad()
def measure(folder: Path, held_out: dict[str, Rows], tables: NgramTables, limit: int = 480) -> dict[str, Any]:
    """Figures of the saved model: parameters, held-out losses, expert use, similarity of hooked neighbours.

    Args:
        held_out: rows by group; about `limit` evenly spaced ones are measured, by the n-gram tables too.

    Returns:
        {"parameters", "file_bytes", "loss" (nats per token, over all rows and by group), "expert_use" (per layer and
        expert, share of routed tokens: smallest and largest), "centred_cosine" ({"6/7": ...})}.
    """
    model = Qwen3_5MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False)
    every = max(1, sum(map(len, held_out.values())) // limit)
    rows = {name: group[::every] for name, group in held_out.items()}
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in rows}
    use, cosines, count = torch.zeros(1), torch.zeros(1), 0
    for name, group in rows.items():
        for start in range(0, len(group), 8):
            ids, mask = pad_rows(group[start : start + 8], int(model.config.pad_token_id or 0))
            loss, output = forward(model, ids, mask)
            losses[name].append(loss)
            probabilities = torch.stack(list(output.router_logits))[:, mask.flatten()].softmax(-1)
            use = use + _use(probabilities, model.config.num_experts_per_tok) * int(mask.sum())
            streams = torch.stack([stream[mask] for stream in output.hidden_states[1:-1]])
            cosines = cosines + centered_cosine(streams[:-1], streams[1:]) * int(mask.sum())
            count += int(mask.sum())
    everything = [row for group in rows.values() for row in group]
    figures: dict[str, dict[str, float]] = {}
    for name, group in {"all": everything, **rows}.items():
        values = torch.cat([x for key in rows if name in ("all", key) for x in losses[key]])
        unigram, bigram = tables.losses(group)
        figures[name] = {"model": values.mean().item(), "unigram": unigram, "bigram": bigram, "tokens": len(values)}
    last = model.config.num_hidden_layers - 1
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": figures,
        "expert_use": {"smallest": (use / count).min().item(), "largest": (use / count).max().item()},
        "centred_cosine": {f"{a}/{b}": (cosines[a] / count).item() for a, b in NEIGHBOURS if b < last},
    }
