"""The published language model up to its last hooked layer, on a GPU that computes nothing: launches, bytes, time by
the traffic model, memory, batches per window.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from gpu_free.fake_card import BYTES_PER_S, fake_card
from gpu_free.fake_lm import CONFIG, published_lm
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

from qwenscope.lm.batches import cut
from qwenscope.lm.sites import sites_of
from qwenscope.parallel.owners import owners
from qwenscope.planning.measure import batches_of
from qwenscope.planning.memory import memory_needs
from qwenscope.planning.plan import model_size
from qwenscope.recipe import load_recipe

LENGTH, TOKENS = 2048, 4096
LAUNCHES, BYTES_PER_POSITION, MILLISECONDS = 2200, 21.7e6, 45.0
"""Of a full batch; milliseconds per 4,096 positions."""
REPEATED_HEADS = 1.5e6
REPEATED_HELD = 16_384
"""Bytes more per position, passed and held at once, where transformers (5.17) repeats queries' and keys' heads before
the delta rule."""


def test_a_pass_stays_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("qwen3.5-35b-a3b")
    depth, sites = recipe.last_layer + 1, sites_of(recipe)
    rows = recipe.corpus.batch_tokens // LENGTH
    with fake_card(monkeypatch, host=True) as card:
        lm = published_lm(depth, monkeypatch, card)
        held = card.in_use
        card.forget()
        with card.waiting() as waits:
            lm.streams(torch.zeros(rows, LENGTH, dtype=torch.int64), [LENGTH] * rows, sites)
    positions = rows * LENGTH
    repeated = REPEATED_HEADS if "repeat_interleave" in inspect.getsource(Qwen3_5MoeGatedDeltaNet) else 0.0
    size = model_size(CONFIG, depth)
    planned = memory_needs(recipe, CONFIG, size.parameters, owners(recipe, 1))
    assert waits == {"aten::_local_scalar_dense": 1}, waits  # transformers looks whether position ids run on
    assert card.operators.total() + card.kernels.total() <= LAUNCHES
    assert card.flops / positions == pytest.approx(size.flops_per_token, rel=0.05)
    assert card.bytes / positions <= BYTES_PER_POSITION + repeated
    assert card.kernels["norm"] == 2 * depth + depth // 4 * (3 + 2)  # two a layer, gated ones, queries' and keys'
    assert (card.seconds - repeated * positions / BYTES_PER_S) * 1e3 * TOKENS / positions <= MILLISECONDS
    assert card.kernels["gate"] == card.kernels["combine"] == depth  # around the experts' products
    assert card.kernels["convolution"] == depth // 4 * 3
    assert held == pytest.approx(planned["language_model"], rel=0.01)
    activations = planned["language_model_activations"] + bool(repeated) * REPEATED_HELD * positions
    assert card.peak - held == pytest.approx(activations, rel=0.1)


def test_batches_of_a_window() -> None:
    """Lengths like real ones: log-normal, median 550, cut off at 2,048. A plan reckons with as many batches."""
    recipe, card = load_recipe("qwen3.5-35b-a3b"), torch.device("cuda")
    corpus, random = recipe.corpus, np.random.default_rng(1)
    for window, most, padding in ((131_072, 18, 1.06), (524_288, 21, 1.06)):
        lengths: list[int] = []
        while sum(lengths) < window:
            lengths.append(int(np.clip(random.lognormal(np.log(550), 0.8), 16, corpus.max_length)))
        batches = cut(lengths, corpus.batch_tokens, card)
        positions = sum(len(members) * max(lengths[member] for member in members) for members in batches)
        assert len(batches) <= most
        planned = batches_of(load_recipe("qwen3.5-35b-a3b", [f"activations.window_tokens={window}"]), card)
        assert len(batches) == pytest.approx(planned.count, abs=2)
        assert positions / sum(lengths) == pytest.approx(planned.padding, abs=0.02)
        assert positions <= padding * sum(lengths)
