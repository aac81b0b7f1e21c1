"""What a run's SAEs refuse to learn from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import status, tiny_recipe
from torch import Tensor

from qwenscope.errors import ResourceError, TrainingError
from qwenscope.lm.sites import sites_of
from qwenscope.parallel.group import ALONE
from qwenscope.recipe import Recipe
from qwenscope.training.run import train
from qwenscope.training.suite import Suite, rows_spread
from qwenscope.training.trainer import SAETrainer

HIDDEN = 16


def language_model(recipe: Recipe) -> Any:
    """All that a suite asks of one whose rows have HIDDEN numbers."""
    kinds = dict.fromkeys(range(recipe.last_layer + 1), "attention")
    return SimpleNamespace(
        hidden_dim=HIDDEN,
        width=lambda _site: HIDDEN,
        device=torch.device("cpu"),
        layer_kinds=kinds,
        name="x",
        revision=None,
    )


def calibrate(recipe: Recipe, rows: Tensor) -> None:
    """The suite of `recipe` meets these rows at every hook point."""
    Suite(recipe, language_model(recipe), ALONE, {}).calibrate(dict.fromkeys(sites_of(recipe), rows))


def drawn(scale: float, mean: float = 0.0) -> Tensor:
    return (torch.randn(3000, HIDDEN, generator=torch.Generator().manual_seed(1)) + mean) * scale


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (torch.zeros(50, HIDDEN), r"do not differ.*training\.calibration_tokens"),
        (torch.full((50, HIDDEN), 0.1), "do not differ"),
        (drawn(1.0)[:1], r"its 1 calibration rows at layers.* do not differ"),
        (drawn(1e30), r"are about 1e.30, too large for float32"),
    ],
)
def test_rows_that_nothing_can_be_learnt_from_are_refused(
    rows: Tensor, said: str, normalise: bool, model: Path
) -> None:
    with pytest.raises(TrainingError, match=said):
        calibrate(tiny_recipe(model, training__normalise=normalise), rows)


def test_a_step_without_room_names_its_sae(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    monkeypatch.setattr(SAETrainer, "device_step", full)
    recipe = tiny_recipe(model)
    suite = Suite(recipe, language_model(recipe), ALONE, {})
    first = next(iter(recipe.hook_points))
    with pytest.raises(ResourceError, match=rf"a step of {first}: set activations\.overlap.*out of memory") as error:
        suite.step(dict.fromkeys(sites_of(recipe), drawn(1.0)), 1)
    assert "\n" not in str(error.value)


def test_rows_far_below_the_learning_rate_need_to_be_normalised(model: Path) -> None:
    with pytest.raises(TrainingError, match=r"spread by 1e-20, far below the learning rate.*training\.normalise"):
        calibrate(tiny_recipe(model, training__normalise=False), drawn(1e-20))
    calibrate(tiny_recipe(model, training__normalise=True), drawn(1e-20))
    for scale in (0.01, 1.0, 1e6):
        calibrate(tiny_recipe(model, training__normalise=False), drawn(scale, 3.0))


def test_spread_is_that_of_numpy_in_float64() -> None:
    rows = drawn(1e25, 2.0)
    wanted = rows.double().numpy()
    assert rows_spread(rows) == pytest.approx(
        (np.sqrt(wanted.var(axis=0).mean()), np.sqrt(np.square(wanted).mean())), rel=1e-12
    )


def test_a_run_that_calibrates_on_one_token_says_so(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"raise training\.calibration_tokens"):
        train(tiny_recipe(model, training__calibration_tokens=1), tmp_path / "run")
    assert status(tmp_path / "run")["state"] == "failed"
