"""An evaluation on a GPU that computes nothing: devices, dtypes, and how often the host waits for the device."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_free.fake_card import fake_card, on_card
from gpu_free.fake_lm import CONFIG, published_lm

from qwenscope.corpus.conversation import Conversation
from qwenscope.evaluation.measure import SplitMeter
from qwenscope.lm.sites import Site
from qwenscope.recipe import load_recipe
from qwenscope.sae.sae import TopKSAE

LENGTH = 64
LEAST, MORE = 80, 63
"""Waits of a split of one batch with one SAE, and with each further one at a site of its own."""


@pytest.mark.parametrize("saes", [1, 2])
def test_what_an_evaluation_waits_for(saes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mismatch of devices would raise. It asks the device for what shapes and Python's numbers depend on: which rows
    predict, are kept, or are of a role; how many; sums; that position ids run on (transformers, each pass). The losses'
    loop over the vocabulary, where the time goes, asks for nothing.
    """
    ids, roles = np.zeros(LENGTH, np.int32), np.zeros(LENGTH, np.uint8)
    conversations = [Conversation(f"{i:08x}", "files", "chat", ids, roles, False, [], None, "") for i in range(4)]
    with fake_card(monkeypatch, host=True) as card, card.waiting() as waits:
        lm = published_lm(4, monkeypatch, card, head=True)
        named = {f"sae_{i}": on_card(TopKSAE(CONFIG.hidden_size, 1024, 8, seed=0)) for i in range(saes)}
        sites = {sae_id: Site(f"layers.{layer}") for layer, sae_id in enumerate(named)}
        meter = SplitMeter(lm, named, sites, conversations, load_recipe("qwen3.5-35b-a3b"))
        waits.clear()  # of placing them
        measured = meter.run()
    assert set(measured.figures) == set(named)
    assert waits.total() <= LEAST + MORE * (saes - 1), waits
