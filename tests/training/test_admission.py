"""Which engine computes a run's rows, and what is refused before anything is loaded. vLLM itself: test_vllm.py."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_run import make_language_model, status, tiny_recipe

from qwenscope.errors import ModelError, RecipeError
from qwenscope.files import read_json
from qwenscope.lm.model import LanguageModel
from qwenscope.recipe import load_recipe
from qwenscope.training.admission import open_source
from qwenscope.training.run import train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("model"))


def test_the_default_is_transformers(model: Path) -> None:
    recipe = tiny_recipe(model)
    assert recipe.lm.backend == "transformers"
    with ExitStack() as closing:
        source, verdict = open_source(recipe.lm, recipe, None, 1, closing)
    assert isinstance(source, LanguageModel)
    assert len(source.layers) == 4
    assert verdict is None


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_run_fails_and_names_the_extra(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lm\.backend is vllm, which is not installed: pip install vllm"):
        train(tiny_recipe(model, lm__backend="vllm"), tmp_path / "run")
    assert status(tmp_path / "run")["state"] == "failed"
    assert "pip install vllm" in status(tmp_path / "run")["error"]
    assert "parity" not in read_json(tmp_path / "run/run.json")


def test_several_ranks_are_refused(model: Path) -> None:
    recipe = tiny_recipe(model, lm__backend="vllm")
    with ExitStack() as closing, pytest.raises(RecipeError, match=r"lm\.backend vllm works in one process, not in 4"):
        open_source(recipe.lm, recipe, None, 4, closing)


@pytest.mark.parametrize("device", ["cuda:0,cuda:1", "cuda:1"])
def test_a_device_that_vllm_cannot_choose_is_refused(device: str) -> None:
    with pytest.raises(RecipeError, match=f"backend vllm runs on one device .* not {device}"):
        load_recipe("standin", ["lm.backend=vllm", f"lm.device={device}"])


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"lm\.backend"):
        load_recipe("standin", ["lm.backend=jax"])
