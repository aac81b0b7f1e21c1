"""Kernels that tune themselves: a run writes down what they chose, and goes on by it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_run import status, tiny_recipe

from qwenscope.lm.tuned import choices, choose
from qwenscope.training.run import train
from qwenscope.training.telemetry import Progress

triton = pytest.importorskip("triton")
KEYS = (64, True, "torch.bfloat16", None), (128, False, "torch.float32", None)


def kernel(x, d):  # what is written is never compiled here
    pass


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The autotuner of a kernel as flash-linear-attention has them, under a heuristic; its module re-exports it."""
    configs = [triton.Config({"BK": width}, num_warps=warps) for width in (32, 64) for warps in (2, 4)]
    tuned = triton.autotune(configs, key=["d"])(triton.jit(kernel))
    package, module = ModuleType("fla"), ModuleType("fla.ops.made_up")
    module.kernel = package.kernel = triton.heuristics({"IS_VARLEN": lambda args: False})(tuned)
    monkeypatch.setitem(sys.modules, "fla", package)
    monkeypatch.setitem(sys.modules, "fla.ops.made_up", module)
    return tuned


def test_choices_are_taken_over(tuner: Any) -> None:
    assert choices() == {}  # nothing has been tuned
    tuner.cache |= {KEYS[0]: tuner.configs[3], KEYS[1]: tuner.configs[0]}
    saved = json.loads(json.dumps(choices()))
    (name,) = saved
    assert name == f"{__name__}.kernel"
    assert len(saved[name]) == 2
    tuner.cache = {KEYS[0]: tuner.configs[1]}  # another process tuned otherwise
    assert choose(saved) == []
    assert tuner.cache == {KEYS[0]: tuner.configs[3], KEYS[1]: tuner.configs[0]}
    assert choices() == saved


def test_a_choice_that_is_not_there_is_named_and_the_kernel_left_alone(tuner: Any) -> None:
    tuner.cache = {KEYS[0]: tuner.configs[2]}
    (name,) = saved = choices()
    other = {name: {repr(KEYS[0]): "BK: 128, num_warps: 2"}, "fla.gone.kernel": saved[name]}
    assert choose(other) == [name, "fla.gone.kernel"]
    assert tuner.cache == {KEYS[0]: tuner.configs[2]}


def test_a_machine_without_such_kernels_has_no_choices() -> None:
    assert "fla" not in sys.modules
    assert choices() == {}


@pytest.mark.parametrize("known", [True, False])
def test_a_resumed_run_chooses_as_before(
    tuner: Any, known: bool, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped by its own progress, and begun again where kernels have tuned otherwise."""

    def stop(progress: Progress) -> None:
        if progress.phase == "training" and progress.tokens > 1000:
            raise RuntimeError

    recipe = tiny_recipe(model)
    tuner.cache = {KEYS[0]: tuner.configs[3]}
    with pytest.raises(RuntimeError):
        train(recipe, tmp_path, on_progress=stop)
    tuner.cache = {KEYS[0]: tuner.configs[0]}
    if not known:
        tuner.configs = tuner.configs[:2]
    train(recipe, tmp_path, resume=True)
    assert status(tmp_path)["state"] == "complete"
    assert tuner.cache == {KEYS[0]: triton.Config({"BK": 64}, num_warps=4) if known else tuner.configs[0]}
    assert (f"{__name__}.kernel: flash-linear-attention has no such configuration here" in caplog.text) is not known
