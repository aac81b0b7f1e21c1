"""A step inside the model on a GPU that computes nothing: devices, dtypes, memory, waits for the device."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from gpu_free.fake_card import fake_card
from gpu_free.fake_lm import CONFIG, published_lm
from gpu_free.test_windows_on_card import Endless
from torch import Tensor

from qwenscope.activations.windows import Windows
from qwenscope.lm.model import cut_config
from qwenscope.parallel.group import ALONE
from qwenscope.parallel.owners import owners
from qwenscope.planning.memory import memory_needs
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.training.closing import ClosingPhase
from qwenscope.training.suite import Suite

LAYERS, LENGTH = 8, 2048
WAITS = 12
"""Of a step of two SAEs on one batch, of any number of rows."""


def recipe() -> Recipe:
    """Two of the published SAEs, of which the lower one has most of a small model above it."""
    whole = load_recipe("qwen3.5-35b-a3b", ["training.kl_share=0.1", "activations.overlap=false"])
    points = {
        sae_id: point.model_copy(update={"dict_size": 1024, "k": 8})
        for sae_id, point in whole.hook_points.items()
        if point.layer < LAYERS
    }
    return whole.model_copy(update={"hook_points": points})


def grad(output: Tensor, leaf: Tensor, gradient: Tensor) -> tuple[Tensor]:
    """torch's engine asks for a card that is there; here what it is given, and what it makes."""
    assert output.requires_grad
    assert leaf.requires_grad
    assert (gradient.shape, gradient.dtype, gradient.device) == (output.shape, output.dtype, output.device)
    return (torch.empty_like(leaf),)


def test_a_step_inside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way back is not run. The host asks which tokens have a successor, and transformers whether ids run on."""
    monkeypatch.setattr(torch.autograd, "grad", grad)
    wanted = recipe()
    config = cut_config(CONFIG, LAYERS)
    with fake_card(monkeypatch, host=True) as card, card.waiting() as waits:
        lm = published_lm(LAYERS, monkeypatch, card, head=True)
        suite = Suite(wanted, lm, ALONE, {})
        parameters = sum(weight.numel() for weight in lm.model.parameters())
        planned = memory_needs(wanted, config, parameters, owners(wanted, 1))
        stream: Any = Endless([LENGTH])
        with closing(Windows(lm, stream, wanted)) as windows:
            phase = ClosingPhase(lm, windows, suite, wanted)
            held = card.in_use
            card.forget()
            waits.clear()
            rows = phase.step(wanted.training.batch_size, 1)
    assert rows == wanted.training.batch_size
    assert waits.total() <= WAITS, waits
    assert card.peak - held <= planned["closing_phase"] + planned["language_model_activations"] + planned["step"]
    numbers = suite._last
    assert {str(metrics.kl.device) for metrics in numbers.values() if metrics.kl is not None} == {"cuda:0"}
    assert len(numbers) == len(wanted.hook_points)
