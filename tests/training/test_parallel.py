"""Several ranks against one process: the same tokens, the same losses, the same bits; who owns what, and bytes sent."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_ranks import complete, three_saes
from tiny_run import BATCH, STEPS, final_hashes, make_language_model, metrics, status

from qwenscope.activations.division import Division
from qwenscope.corpus.batches import cut
from qwenscope.errors import RecipeError, ResourceError
from qwenscope.ranks import Group
from qwenscope.recipe import load_recipe
from qwenscope.roofline import GPUS, ModelSize, position_seconds, step_seconds
from qwenscope.training import checkpoint
from qwenscope.training.parallel import deal, joined, owners

HIDDEN, FLOAT = 32, 4
TOKENS = STEPS * BATCH - 10


@dataclass(frozen=True)
class Run:
    """A finished job."""

    path: Path
    did: list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """One run per number of ranks: three SAEs, two of them at one layer, so that of four ranks one owns nothing."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = three_saes(model, activations__outlier_factor=1.5, corpus__batch_tokens=160)
    return {size: Run(folder / f"{size}", complete(size, recipe, folder / f"{size}")) for size in (1, 2, 3, 4)}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_weights_and_metrics_are_those_of_one_process_to_the_bit(runs: dict[int, Run], size: int) -> None:
    assert len(final_hashes(runs[1].path)) == 9
    assert final_hashes(runs[size].path) == final_hashes(runs[1].path)
    assert metrics(runs[size].path) == metrics(runs[1].path)  # every loss of every SAE, tokens left out, ...
    assert metrics(runs[1].path)[-1]["left_out"]["outlier"] > 50
    assert status(runs[size].path)["state"] == "complete"
    assert (runs[size].path / "privacy_report.json").read_text() == (runs[1].path / "privacy_report.json").read_text()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_batch_runs_on_one_rank_and_each_token_is_used_once(runs: dict[int, Run], size: int) -> None:
    alone, of_ranks = runs[1].did[0], runs[size].did
    ran = [Counter(did["batches"]) for did in of_ranks]
    assert sum(ran, Counter()) == Counter(alone["batches"])
    assert all(len(each) > 5 for each in ran)
    for did in of_ranks:
        assert did["tokens"] == alone["tokens"]
    assert len(alone["tokens"]) == len({tuple(token) for token in alone["tokens"]}) == TOKENS


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_sent_are_what_the_documentation_says(runs: dict[int, Run], size: int) -> None:
    """docs/scaling.md: rows go to each owner but the rank they are on, norms of all tokens to all other ranks."""
    layers = {"sae_delta": 1, "sae_attn": 3, "sae_delta_small": 1}
    owned = [len({layers[name] for name in names}) for names in owners(three_saes(Path("model")), size)]
    did = runs[size].did
    harvested = did[0]["harvested"]
    assert len(did[0]["tokens"]) <= sum(harvested) <= did[0]["read"]
    rows = sum(count * (sum(harvested) - own) for count, own in zip(owned, harvested, strict=True))
    norms = did[0]["read"] * 2 * (size - 1)
    assert sum(each["sent"] for each in did) == rows * HIDDEN * FLOAT + norms * FLOAT


def test_a_checkpoint_does_not_tell_how_many_ranks_wrote_it(runs: dict[int, Run]) -> None:
    alone, four = (checkpoint.load_newest(runs[size].path / "checkpoints")[0] for size in (1, 4))
    assert alone is not None
    assert four is not None
    assert {stem: sorted(group) for stem, group in four.tensors.items()} == {
        stem: sorted(group) for stem, group in alone.tensors.items()
    }
    for stem, group in alone.tensors.items():
        for name, value in group.items():
            assert value.equal(four.tensors[stem][name]), (stem, name)
    assert four.state["windows"] == alone.state["windows"]
    assert four.state["guard"] == alone.state["guard"]


def test_ranks_read_the_cache_that_one_process_filled(model: Path, tmp_path: Path) -> None:
    recipe = three_saes(model, activations__cache=str(tmp_path / "cache"), training__tokens=20 * BATCH)
    alone = complete(1, recipe, tmp_path / "alone")
    shutil.rmtree(next((tmp_path / "cache").glob("*/window-000001")))
    did = complete(2, recipe, tmp_path / "two")
    assert final_hashes(tmp_path / "two") == final_hashes(tmp_path / "alone")
    ran = [len(each["batches"]) for each in (*alone, *did)]
    assert 0 < ran[1] + ran[2] < ran[0]  # the window that is missing
    assert not any((tmp_path / "cache").glob("*/window-000001"))


def test_the_published_nine_are_balanced_over_two_to_eight_ranks() -> None:
    recipe = load_recipe("qwen3.5-35b-a3b")
    for size in (2, 3, 4, 8):
        weights = [sum(recipe.hook_points[name].dict_size for name in names) for names in owners(recipe, size)]
        assert sum(weights) == 2 * 8192 + 7 * 16384
        assert max(weights) <= 1.15 * sum(weights) / size
    assert max(weights) == min(weights)
    assert sorted(name for names in owners(recipe, 4) for name in names) == sorted(recipe.hook_points)


def test_harvest_evens_out_what_saes_do_not() -> None:
    """Four ranks, nine SAEs, windows of made-up conversations: time for SAE steps and language model within 15 %."""
    recipe = load_recipe("qwen3.5-35b-a3b")
    size = ModelSize(layers=36, parameters=0, active_parameters=0, flops_per_token=int(4.39e9))
    position = sum(position_seconds(size, GPUS["h200"]))
    steps = [
        sum(sum(step_seconds(recipe, recipe.hook_points[name], 2048, GPUS["h200"])) for name in names)
        for names in owners(recipe, 4)
    ]
    assert max(steps) > 1.05 * sum(steps) / 4  # k weighs beside the dictionary: SAEs alone are less even
    busy = tuple(seconds * recipe.activations.window_tokens / 4096 / position for seconds in steps)
    draw = np.random.default_rng(5)
    for _ in range(20):
        lengths: list[int] = []
        while sum(lengths) < recipe.activations.window_tokens:
            lengths.append(int(np.clip(draw.lognormal(6.3, 0.9), 8, 2048)))
        positions = [len(members) * lengths[members[0]] for members in cut(lengths, recipe.corpus.batch_tokens)]
        dealt = Division(Group(0, 4), ((),) * 4, busy).deal(positions)
        loads = list(busy)
        for rank, count in zip(dealt, positions, strict=True):
            loads[rank] += count
        assert max(loads) <= 1.15 * sum(loads) / 4


def test_devices_that_ranks_cannot_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "MASTER_ADDR": "far-away", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for device in ("cuda:0", "cuda:0,cuda:1"):
        with pytest.raises(RecipeError, match=rf"lm.device {device} names what one process uses"), joined(device):
            pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(ResourceError, match="local rank 9 has no GPU of its own, this machine has 8"), joined("auto"):
        pass


def test_dealing_takes_any_number_of_ranks() -> None:
    assert deal({"a": 3, "b": 2, "c": 2}, 5) == [["a"], ["b"], ["c"], [], []]
    assert deal({"a": 3, "b": 2, "c": 2}, 2) == [["a"], ["b", "c"]]
    assert deal({"a": 3, "b": 2}, 1) == [["a", "b"]]
