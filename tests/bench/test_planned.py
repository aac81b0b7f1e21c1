"""The comparison of plans with runs: its configurations are what they are called, and one goes through."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qwenscope.recipe import load_recipe


@pytest.fixture(scope="module")
def planned() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_planned", Path(__file__).parents[2] / "bench" / "planned.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_configurations_are_what_they_are_called(planned: ModuleType, tmp_path: Path) -> None:
    recipes = {name: make() for name, make in planned.configurations(tmp_path).items()}
    assert len(recipes["eighteen_saes"].hook_points) == 18
    assert len(recipes["one_sae"].hook_points) == 1
    assert recipes["standin"].hook_points == load_recipe("standin").hook_points
    assert not recipes["wide_plain"].training.normalise
    for recipe in recipes.values():
        assert 2 < recipe.training.tokens / recipe.activations.window_tokens < 3


@pytest.mark.slow
@pytest.mark.parametrize("cpu_time", [False, True])
def test_a_configuration_is_planned_and_run(planned: ModuleType, tmp_path: Path, cpu_time: bool) -> None:
    short = ["training.tokens=3000", "training.warmup_steps=0", "activations.window_tokens=1500"]
    found = planned.compare("short", load_recipe("standin", short), tmp_path / "short", cpu_time)
    for figures in (found["planned"], found["measured"]):
        assert all(value > 0 for value in figures.values())
        parts = figures["load_seconds"] + figures["calibration_seconds"] + figures["saving_seconds"]
        assert figures["seconds"] == pytest.approx(3000 / figures["tokens_per_second"] + parts, rel=0.1)
    for figure, ratio in found["ratio"].items():
        assert ratio == pytest.approx(found["measured"][figure] / found["planned"][figure], abs=1e-3)
