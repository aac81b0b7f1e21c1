"""What no machine can do is refused before it is tried."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import QwenscopeError, RecipeError, ResourceError
from qwenscope.limits import check_memory, check_workers
from qwenscope.lm.load import load_tokenizer
from qwenscope.recipe import load_recipe
from qwenscope.training.run import train


def test_workers_are_bounded_by_the_cores() -> None:
    cores = os.cpu_count() or 1
    check_workers(4 * cores)
    with pytest.raises(RecipeError, match=rf"corpus.workers {4 * cores + 1} .* set it to {cores}$"):
        check_workers(4 * cores + 1)
    recipe = load_recipe("standin", ["corpus.workers=1000000"])
    with pytest.raises(RecipeError, match=r"corpus\.workers 1000000"):
        CorpusStream(recipe.corpus, load_tokenizer(recipe.lm), seed=0, workers=recipe.corpus.workers)


def test_memory_is_counted_from_below() -> None:
    recipe = load_recipe("qwen3.5-35b-a3b")
    check_memory(load_recipe("standin"), 64)
    window = psutil.virtual_memory().total // (2 * 2048 * 9) + 1
    for ranks, override, key in (
        (1, f"activations.window_tokens={window * 100}", "activations.window_tokens"),
        (1, "hook_points.sae_attn_mid.dict_size=2000000000", "hook_points.sae_attn_mid.dict_size 2,000,000,000"),
    ):
        asked = load_recipe("qwen3.5-35b-a3b", [override])
        with pytest.raises(ResourceError, match=f"{key}.* bytes of memory at least"):
            check_memory(asked, 2048, ranks)
        check_memory(asked, 2048, 1_000_000)
    assert recipe.hook_points


@pytest.mark.parametrize(
    ("override", "culprit"),
    [
        ("activations.window_tokens=1000000000000000", "activations.window_tokens"),
        ("hook_points.sae_attn_mid.dict_size=2000000000", "hook_points.sae_attn_mid.dict_size"),
        ("hook_points.sae_attn_mid.dict_size=1000000000000", "hook_points.sae_attn_mid.dict_size"),
        ("activations.window_tokens=1000000000000000000", "activations.window_tokens"),
    ],
)
def test_a_run_says_so_before_it_loads_the_model(
    override: str, culprit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("qwenscope.training.admission.load_language_model", loaded)
    with pytest.raises(QwenscopeError, match=culprit):
        train(load_recipe("standin", [override]), tmp_path / "run")
