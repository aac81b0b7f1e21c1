"""Latents that point at rows, or at what is left of rows, before the first step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_trainer import HIDDEN, LATENTS, make_trainer, rows

from qwenscope.seeds import generator
from qwenscope.training import initial


@pytest.mark.parametrize("normalise", [False, True])
def test_latents_point_at_different_rows_from_their_mean(*, normalise: bool) -> None:
    sample = rows(500, 3)
    found = []
    for seed in (7, 7, 8):
        trainer = make_trainer(normalise=normalise, initial_decoder="rows", precision="exact", seed=seed)
        trainer.calibrate(sample)
        found.append(trainer.weights["decoder"].clone())
    directions = torch.nn.functional.normalize(sample.double() - sample.double().mean(0), dim=1)
    best = (found[0].double() @ directions.T).max(1)
    torch.testing.assert_close(best.values, torch.ones(LATENTS, dtype=torch.float64), rtol=0, atol=1e-6)
    assert len(best.indices.unique()) == LATENTS
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    ratio = trainer.weights["encoder"] / trainer.weights["decoder"]
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-4, atol=0)


def test_latents_point_at_what_four_earlier_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against least squares by numpy, row by row, in float64; the first part points at rows."""
    monkeypatch.setattr(initial, "_PART", 24)
    sample = rows(500, 3)
    trainer = make_trainer(normalise=True, initial_decoder="residuals", precision="exact")
    trainer.calibrate(sample)
    x = sample.double().numpy() - sample.double().mean(0).numpy()
    found: list[np.ndarray] = []
    for place, row in enumerate(torch.randperm(500, generator=generator(7, "initial decoder"))[:LATENTS].tolist()):
        left = x[row]
        if begin := place // 24 * 24:
            earlier = np.stack(found[:begin])
            best = earlier[np.argsort(-(earlier @ left))[:4]]
            by = np.linalg.solve(best @ best.T + 1e-3 * np.eye(4), best @ left).clip(0)
            left = left - by @ best
        found.append(left / np.linalg.norm(left))
    assert LATENTS > 2 * 24
    got = trainer.weights["decoder"].double().numpy()
    assert np.median((got * np.stack(found)).sum(1)) > 1 - 1e-6
    assert ((got * np.stack(found)).sum(1) > 1 - 1e-4).mean() > 0.95  # rounding may choose another fourth direction


def test_rows_of_which_nothing_is_left_turn_no_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiples of two directions, which the first part has."""
    monkeypatch.setattr(initial, "_PART", 24)
    trainer = make_trainer(initial_decoder="residuals")
    start = trainer.weights["decoder"].clone()
    sample = torch.zeros(500, HIDDEN)
    sample[:250, 0], sample[250:, 1] = 2.0, -2.0
    trainer.calibrate(sample)
    assert torch.equal(trainer.weights["decoder"][24:], start[24:])
    assert (trainer.weights["decoder"][:24, :2].abs() > 0.7).all()


@pytest.mark.parametrize("initial_decoder", ["rows", "residuals"])
def test_latents_without_a_row_to_point_at_stay_as_they_are(initial_decoder: str) -> None:
    trainer = make_trainer(initial_decoder=initial_decoder)
    start = trainer.weights["decoder"].clone()
    sample = torch.tensor([[1.0] + [0.0] * (HIDDEN - 1), [0.0] * HIDDEN, [-1.0] + [0.0] * (HIDDEN - 1)])
    trainer.calibrate(sample)
    still = int(torch.randperm(3, generator=generator(7, "initial decoder")).argsort()[1])  # who draws the mean
    turned = [latent for latent in range(3) if latent != still]
    assert torch.equal(trainer.weights["decoder"][turned].abs(), sample[[0, 0]])
    rest = [still, *range(3, LATENTS)]
    assert torch.equal(trainer.weights["decoder"][rest], start[rest])


def test_rows_explain_more_than_random_directions_do() -> None:
    fvu = {}
    for initial_decoder in ("random", "rows", "residuals"):
        trainer = make_trainer(normalise=True, initial_decoder=initial_decoder, precision="fp32")
        trainer.calibrate(rows(500, 3))
        fvu[initial_decoder] = float(trainer.step(rows(256, 4)).fvu)
    assert fvu["rows"] < 0.9 * fvu["random"]
    assert fvu["residuals"] < 0.9 * fvu["random"]
