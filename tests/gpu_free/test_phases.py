"""What a run does beside its steps, on a GPU that computes nothing: devices, dtypes, memory, waits for the device."""

from __future__ import annotations

import pytest
import torch
from gpu_free.fake_card import fake_card, on_card
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qwenscope.sae.sae import SAE, TopKSAE
from qwenscope.sae.selection import PRECISIONS
from qwenscope.training.trainer import SAETrainer

LATENTS, HIDDEN, BATCH = 256, 64, 128


def trainer(**options: object) -> SAETrainer:
    return SAETrainer(on_card(TopKSAE(HIDDEN, LATENTS, 8, seed=0)), 1e-4, **options)


def rows(count: int = BATCH) -> torch.Tensor:
    return torch.empty(count, HIDDEN, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("initial_decoder", ["random", "rows", "residuals"])
def test_calibration(normalise: bool, initial_decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_card(monkeypatch) as card:
        one = trainer(normalise=normalise, initial_decoder=initial_decoder)
        with card.waiting() as waits:
            one.calibrate(rows(3000))
        assert waits == {"aten::_local_scalar_dense": 1}, waits  # whether the rows are finite
        card.forget()
        one.device_step(rows())
    assert card.to_host == 0


@pytest.mark.parametrize("options", [{}, {"prefixes": (32, 100)}, {"moments": torch.bfloat16}, {"precision": "fp32"}])
def test_steps_with_dead_latents(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_card(monkeypatch) as card:
        one = trainer(**options)
        with card.waiting() as waits:
            one.step(rows())  # lists the dead
        assert waits == {"aten::nonzero": 1}, waits
        card.forget()
        for _ in range(5):
            one.step(rows())
    assert one.named is not None
    assert card.to_host == 0


def test_resampling_and_resuming(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_card(monkeypatch) as card:
        first, second = (trainer(resample_every_steps=2) for _ in range(2))
        with card.waiting() as waits:
            first.step(rows())
            waits.clear()
            first.step(rows())
            assert waits["aten::_local_scalar_dense"] == 1, waits  # how many are dead
            state = first.state_dict()
            with unset_fake_temporarily():  # the host's own numbers have values
                counted = [first.steps, first.tokens_trained, PRECISIONS.index(first.precision), 0]
                state |= {"counters": torch.tensor(counted), "pool.cursor": torch.tensor(0)}
            second.load_state_dict(state)
            second.step(rows())
        assert {value.device.type for value in second.weights.parameters.values()} == {"cuda"}
        assert isinstance(first.sae(), SAE)
    assert card.held
