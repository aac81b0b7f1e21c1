"""The simulation of scaling: what it says of one card and of several hangs together, and the page shows its table."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from qwenscope.recipe import load_recipe

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_scaling", REPOSITORY / "bench" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_hang_together_and_stand_in_the_documentation(scaling: ModuleType) -> None:
    recipe = load_recipe("qwen3.5-35b-a3b")
    rows = [scaling.row(recipe, "h200", gpus, 4_194_304) for gpus in (1, 8)]
    assert rows[0]["of_linear"] == [1.0, 1.0]
    assert rows[0]["megabytes_per_step"] == 0
    assert (rows[0]["window_tokens"], rows[1]["window_tokens"]) == (131_072, 5 * 131_072)  # three batches for each
    for end in (0, 1):
        assert rows[0]["tokens_per_second"][end] < rows[1]["tokens_per_second"][end]
        assert rows[1]["tokens_per_second"][end] < 8 * rows[0]["tokens_per_second"][end]
        assert rows[1]["hours_10B"][end] > 49 * (rows[1]["hours"][end] - 0.05)  # loading counts once
    page = (REPOSITORY / "docs" / "scaling.md").read_text()
    for line in scaling.table({"qwen3.5-35b-a3b": rows}).splitlines():
        assert line in page


def test_one_sae_per_layer(scaling: ModuleType) -> None:
    recipe = scaling.every_layer(load_recipe("qwen3.5-35b-a3b"))
    assert recipe.sites == tuple(f"layers.{layer}" for layer in range(40))
