"""The published language model on a GPU that computes nothing, with the kernels that a card would have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.masking_utils
from gpu_free.fake_card import Card, Launches
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Qwen3_5MoeTextConfig

from qwenscope.lm.fused import convolution, experts, norms
from qwenscope.lm.load import layer_kinds
from qwenscope.lm.model import LanguageModel, cut_config, decoder_layers

CONFIG = Qwen3_5MoeTextConfig(dtype="bfloat16")
"""Qwen3.5-35B-A3B's text model: what transformers takes where a config says nothing else."""
_CHUNK = 64  # positions between two states that fla writes down


def published_lm(layers: int, monkeypatch: pytest.MonkeyPatch, card: Card, *, head: bool = False) -> LanguageModel:
    """Its first `layers`, made on a card of capability 9.0 that has flash-linear-attention; with a `head` these are
    all that it has.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for module in (norms, experts, convolution):
        monkeypatch.setattr(module, "_admitted", {})
        for name, kernel in vars(module).copy().items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Launches(card, kernel))
    monkeypatch.setattr(transformers.masking_utils, "is_tracing", lambda *_: False)  # it takes fake tensors for that
    auto: Any = AutoModelForCausalLM if head else AutoModel
    with torch.device("meta"):
        model: Any = auto.from_config(cut_config(CONFIG, layers), dtype=torch.bfloat16)
    for part in model.modules():
        for name, value in part._parameters.items():
            if value is not None:
                there = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                part._parameters[name] = nn.Parameter(there, requires_grad=False)
        for name, value in part._buffers.items():
            part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    model.train(False)
    tokenizer: Any = SimpleNamespace(pad_token_id=0, get_added_vocab=lambda: {"<|im_start|>": 248_045})
    allowed, card.may_wait = card.may_wait, True  # norms are compared
    lm = LanguageModel(
        model, tokenizer, decoder_layers(model, layers), layer_kinds(CONFIG)[: layers if head else None],
        CONFIG.hidden_size, torch.device("cuda", 0), torch.bfloat16, "fake", None,
    )  # fmt: skip
    card.may_wait = allowed
    modeling = __import__(type(lm.layers[0]).__module__, fromlist=["_"])
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", _Kernels(card).delta_rule)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", _Kernels(card).attention)
    return lm


class _Kernels:
    """What stands in for kernels that do not run here: shapes, and what the real ones read and write."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, **_: Any) -> Tensor:
        """Fused, causal: no scores in memory, half the products."""
        made = torch.empty_like(query)
        self.card.stream(query, key, value, made)
        self.card.kernels["attention"] += 1
        self.card.flops += 2 * query.numel() * key.shape[2]
        assert is_causal
        return made

    def delta_rule(
        self, query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, output_final_state: bool, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """flash-linear-attention's forward, kernel by kernel: unit queries and keys, sums of decays, products of keys
        within chunks, their inverse, corrected keys and values, states, outputs.
        """
        positions, heads = g.shape[0] * g.shape[1], g.shape[2]
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()  # as fla asks for them
        inner = torch.empty(positions, heads, _CHUNK, dtype=query.dtype, device="cuda")
        inner32 = torch.empty_like(inner, dtype=torch.float32)
        keys = torch.empty(positions, heads, key.shape[-1], dtype=query.dtype, device="cuda")
        shape = (-(-positions // _CHUNK), heads, key.shape[-1], value.shape[-1])
        states = torch.empty(shape, dtype=query.dtype, device="cuda")
        values, made = torch.empty_like(value), torch.empty_like(value)
        for passed in (
            (query, query), (key, key), (g, g), (key, g, beta, inner32), (inner32, inner),
            (key, value, inner, g, beta, keys, values), (key, keys, values, g, states, value),
            (query, key, value, states, g, made),
        ):  # fmt: skip
            self.card.stream(*passed)
            self.card.kernels["delta rule"] += 1
        self.card.flops += 2 * positions * heads * key.shape[-1] * (5 * _CHUNK + 3 * value.shape[-1])
        if not output_final_state:
            return made, None
        return made, torch.empty(len(g), *states.shape[1:], dtype=torch.float32, device="cuda")
