"""The full-size benchmark in its reduced configuration; its full one is the published model's."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import Qwen3_5MoeTextConfig

from qwenscope.lm.load import check_hook_points, layer_kinds
from qwenscope.planning.plan import model_size


@pytest.fixture(scope="module")
def fullsize() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_fullsize", Path(__file__).parents[2] / "bench" / "fullsize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_the_reduced_configuration_runs_end_to_end(
    fullsize: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "fullsize.json"
    monkeypatch.setattr(sys, "argv", ["fullsize.py", "--reduced", "--seconds", "0.1", "--json", str(out)])
    fullsize.main()
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["windows"] >= 1
    assert result["tokens"] >= result["window_tokens"] - result["batch_size"]
    assert result["finite"]
    assert result["language_model"]["layers"] == 36
    assert len(result["saes"]) == 9
    lm, seconds = result["language_model"], result["seconds"]
    shares = result["share_of_time"]
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in shares.values())
    assert lm["tflops"] == pytest.approx(lm["flops_per_token"] * lm["tokens_per_s"] / 1e12)
    assert lm["mfu"] == pytest.approx(lm["tflops"] / lm["peak_tflops"])
    assert result["tokens_per_s"] == pytest.approx(result["tokens"] / seconds)
    assert result["peak_memory_bytes"] > 100e6


def test_the_full_configuration_is_the_published_models(fullsize: ModuleType) -> None:
    config = Qwen3_5MoeTextConfig(**fullsize.FULL)
    recipe = fullsize.published([])
    check_hook_points(layer_kinds(config), recipe.hook_points)
    assert model_size(config, 36).parameters == pytest.approx(30.8e9, rel=0.005)
    assert model_size(config, 40).parameters == pytest.approx(34.15e9, rel=0.02)


def test_conversations_repeat_and_fit(fullsize: ModuleType) -> None:
    streams = [fullsize.RandomConversations(100, 2048, 7) for _ in range(2)]
    first, again = ([next(stream) for _ in range(300)] for stream in streams)
    assert [one.token_ids.tolist() for one in first] == [one.token_ids.tolist() for one in again]
    lengths = [len(one.token_ids) for one in first]
    assert min(lengths) >= 16
    assert max(lengths) == 2048
    assert 600 < sum(lengths) / 300 < 900
    state = streams[0].state()
    following = next(streams[0])
    streams[1].restore(state)
    assert next(streams[1]).token_ids.tolist() == following.token_ids.tolist()
