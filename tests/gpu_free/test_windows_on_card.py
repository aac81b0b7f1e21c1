"""Harvest and windows on a GPU that computes nothing: devices, waits for the device, launches, memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gpu_free.fake_card import fake_card
from gpu_free.fake_lm import CONFIG, published_lm
from torch import Tensor

from qwenscope.activations.windows import Windows
from qwenscope.corpus.conversation import Conversation
from qwenscope.lm.sites import Site
from qwenscope.parallel.owners import owners
from qwenscope.planning.memory import memory_needs, row_bytes
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.training.probe import warm_up

LAYERS, BATCHES = 4, 2
ROOM = 32_768
"""Positions of a language-model batch."""


def recipe(layers: int, window: int) -> Recipe:
    """The published one with a hook point on each of the first layers, and one window in memory at a time."""
    whole = load_recipe("qwen3.5-35b-a3b", ["activations.overlap=false", f"activations.window_tokens={window}"])
    first = next(iter(whole.hook_points.values()))
    points = {
        f"sae_{layer}": first.model_copy(update={"layer": layer, "site": f"layers.{layer}"}) for layer in range(layers)
    }
    return whole.model_copy(update={"hook_points": points})


class Endless:
    """Conversations of given lengths, again and again."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.drawn = lengths, 0

    def __next__(self) -> Conversation:
        length = self.lengths[self.drawn % len(self.lengths)]
        self.drawn += 1
        ids, roles = np.zeros(length, np.int32), np.zeros(length, np.uint8)
        return Conversation(f"{self.drawn:08x}", "random", "chat", ids, roles, False, [], None, "")

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def restore(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_window_holds_what_a_plan_says(left_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches filled to the brim. Where a row is left out, one site at a time stands in memory twice."""
    wanted = recipe(LAYERS, BATCHES * ROOM)
    with fake_card(monkeypatch, host=True) as card:
        lm = published_lm(LAYERS, monkeypatch, card)
        parameters = sum(weight.numel() for weight in lm.model.parameters())
        planned = memory_needs(wanted, CONFIG, parameters, owners(wanted, 1))
        assert card.in_use == pytest.approx(planned["language_model"], rel=0.01)
        stream: Any = Endless([wanted.corpus.max_length])
        card.not_finite = left_out
        card.forget()
        with closing(Windows(lm, stream, wanted)) as windows, card.waiting() as waits:
            batch = windows.next_batch(wanted.training.batch_size)
            assert windows.left_out["non_finite"] == left_out
            held = card.in_use
    # A batch: transformers looks whether its position ids run on. A window: norms decide what is left out.
    assert waits == {"aten::_local_scalar_dense": BATCHES, "to host": 1}, waits
    parts = ("language_model", "language_model_activations", "windows")
    assert card.peak == pytest.approx(sum(planned[part] for part in parts), rel=0.1)
    room = (BATCHES * ROOM + wanted.corpus.max_length) * row_bytes(wanted, CONFIG)
    in_hand = sum(rows.untyped_storage().nbytes() for rows in batch.values())
    assert held == pytest.approx(planned["language_model"] + LAYERS * room + in_hand, rel=0.01)


class Source:
    """Rows out of nothing: what surrounds a language model is looked at alone."""

    def __init__(self, device: str) -> None:
        self.tokenizer: Any = SimpleNamespace(pad_token_id=0)
        self.layer_kinds, self.hidden_dim, self.name, self.revision = ("deltanet",), CONFIG.hidden_size, "rows", None
        self.device, self.dtype = torch.device(device), torch.bfloat16
        self.shapes = list[tuple[int, ...]]()

    def streams(self, input_ids_CT: Tensor, lengths_C: Sequence[int], sites: Sequence[Site]) -> dict[Site, Tensor]:
        self.shapes.append(tuple(input_ids_CT.shape))
        shape = (*input_ids_CT.shape, self.hidden_dim)
        return {site: torch.empty(shape, dtype=self.dtype, device=self.device) for site in sites}

    def width(self, site: Site) -> int:
        return self.hidden_dim

    def digest(self, last_layer: int) -> str:
        return "0"


def test_kernels_tune_themselves_on_a_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU alone."""
    with fake_card(monkeypatch, host=True):
        card, cpu = Source("cuda"), Source("cpu")
        for source in (card, cpu):
            warm_up(source, [Site("layers.0")], 16, 2048)
    assert (card.shapes, cpu.shapes) == ([(16, 2048)], [])


def test_windows_wait_once_and_take_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of conversations of many lengths: waits for the device, launches, sizes of what is kept."""
    wanted = recipe(LAYERS, ROOM)
    size, room = wanted.training.batch_size, (ROOM + wanted.corpus.max_length) * row_bytes(wanted, CONFIG)
    stream: Any = Endless(np.random.default_rng(0).integers(256, wanted.corpus.max_length, 97).tolist())
    source = Source("cuda")
    with fake_card(monkeypatch, host=True) as card, closing(Windows(source, stream, wanted)) as windows:
        for window in range(3):
            card.forget()
            source.shapes.clear()
            card.not_finite = window % 2
            with card.waiting() as waits:
                windows.next_batch(size)
            assert waits == {"to host": 1}, waits  # norms, which decide what is left out
            # of a batch two indices and, at each site, a gather, norms, and where both are kept
            assert card.operators.total() <= len(source.shapes) * (2 + 4 * LAYERS) + 4 * LAYERS + 4, card.operators
            assert [held for held in card.held.values() if held > room // 4] == [room] * LAYERS
            while windows.state()["window"] == window and windows.state()["offset"] <= ROOM - size:
                card.forget()
                windows.next_batch(size)  # a wait would raise
                assert card.operators.total() == LAYERS, card.operators  # a gather at each site
