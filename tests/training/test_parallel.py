"""Several ranks against one process: the same tokens, the same losses, the same bits; who owns what, and bytes sent."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_ranks import complete, ranks, three_saes
from tiny_run import BATCH, STEPS, final_hashes, metrics, status

from qwenscope.activations import cache
from qwenscope.costs import GPUS, ModelSize, position_seconds, step_seconds
from qwenscope.errors import FormatError, RecipeError, ResourceError
from qwenscope.lm.batches import cut
from qwenscope.parallel.group import Group
from qwenscope.parallel.harvest_plan import HarvestPlan
from qwenscope.parallel.launch import joined
from qwenscope.parallel.owners import owners
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.training import checkpoint

HIDDEN, FLOAT = 32, 4
TOKENS = STEPS * BATCH - 10


@dataclass(frozen=True)
class Run:
    """A finished job."""

    path: Path
    did: list[dict[str, Any]]


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


def test_overlap_changes_nothing_on_several_ranks_either(runs: dict[int, Run], tmp_path: Path) -> None:
    recipe = load_recipe(runs[1].path.with_name("1.recipe.yaml"), ["activations.overlap=false"])
    did = complete(3, recipe, tmp_path / "in-turn")
    assert final_hashes(tmp_path / "in-turn") == final_hashes(runs[3].path)
    assert metrics(tmp_path / "in-turn") == metrics(runs[3].path)
    assert did == runs[3].did  # every batch on the same rank in the same order, every byte sent


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
    owned = [len({layers[piece.sae_id] for piece in held}) for held in owners(three_saes(Path("model")), size)]
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


def cache_files(cache: Path) -> dict[str, str]:
    return {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in cache.rglob("*")
        if path.is_file()
    }


def test_any_number_of_ranks_writes_the_same_cache(model: Path, tmp_path: Path) -> None:
    def short(cache: Path) -> Recipe:
        return three_saes(model, activations__cache=str(cache), training__tokens=20 * BATCH)

    complete(1, short(tmp_path / "one"), tmp_path / "alone")
    whole = cache_files(tmp_path / "one")
    assert len(whole) == 2 * 4  # two windows: rows of two layers, tokens, manifest
    complete(3, short(tmp_path / "three"), tmp_path / "written")
    assert cache_files(tmp_path / "three") == whole
    assert final_hashes(tmp_path / "written") == final_hashes(tmp_path / "alone")

    # ranks that read it run no batch, and complete what is missing
    shutil.rmtree(next((tmp_path / "one").glob("*/window-000001")))
    did = complete(2, short(tmp_path / "one"), tmp_path / "completed")
    assert cache_files(tmp_path / "one") == whole
    assert sum(len(each["batches"]) for each in did) > 0
    did = complete(2, short(tmp_path / "one"), tmp_path / "read")
    assert sum(len(each["batches"]) for each in did) == 0
    assert final_hashes(tmp_path / "read") == final_hashes(tmp_path / "completed") == final_hashes(tmp_path / "alone")

    # each rank looks at its own files; what one finds damaged ends all
    victim = next((tmp_path / "one").glob("*/window-000001/layer-03.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with ranks(2, short(tmp_path / "one"), tmp_path / "stopped") as job:
        assert job.wait() == [FormatError.exit_code] * 2, job.errors()
        assert f"{victim} is damaged" in job.errors()


def no_room() -> None:
    """This rank's disk is full when it writes the second window's rows."""
    write_rows = cache.WindowCache.write_rows

    def refuse(self: cache.WindowCache, index: int, rows: Any) -> Any:
        if index == 1:
            raise ResourceError("no space left for window 1")
        return write_rows(self, index, rows)

    cache.WindowCache.write_rows = refuse  # type: ignore[method-assign]


def elsewhere() -> None:
    """This rank's cache is a folder of its own, as on a machine that shares nothing."""
    write = cache._Files.write

    def aside(self: cache._Files, file: str, data: bytes) -> None:
        self._local = self._local.with_name("elsewhere")
        write(self, file, data)

    cache._Files.write = aside  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("before", "said", "windows"),
    [(no_room, "rank 1: no space left for window 1", 1), (elsewhere, "a folder that all machines share", 0)],
)
def test_a_window_that_one_rank_fails_to_write_does_not_exist(
    model: Path, tmp_path: Path, before: Any, said: str, windows: int
) -> None:
    recipe = three_saes(model, activations__cache=str(tmp_path / "cache"))
    with ranks(2, recipe, tmp_path / "run", before={1: before}) as job:
        assert job.wait() == [ResourceError.exit_code] * 2, job.errors()
        assert said in job.errors()
    assert said in status(tmp_path / "run")["error"]
    assert len(list((tmp_path / "cache").rglob("manifest.json"))) == windows
    complete(2, recipe, tmp_path / "run", resume=True)
    assert len(list((tmp_path / "cache").rglob("manifest.json"))) == 3


def test_the_published_nine_are_balanced_over_two_to_eight_ranks() -> None:
    recipe = load_recipe("qwen3.5-35b-a3b")
    for size in (2, 3, 4, 8):
        weights = [sum(piece.latents for piece in held) for held in owners(recipe, size)]
        assert sum(weights) == 2 * 8192 + 7 * 16384
        assert max(weights) <= 1.15 * sum(weights) / size
    assert max(weights) == min(weights)
    assert sorted(piece.stem for held in owners(recipe, 4) for piece in held) == sorted(recipe.hook_points)


def test_harvest_evens_out_what_saes_do_not() -> None:
    """Four ranks, nine SAEs, windows of made-up conversations: time for SAE steps and language model within 15 %."""
    recipe = load_recipe("qwen3.5-35b-a3b")
    size = ModelSize(36, parameters=0, active_parameters=0, flops_per_token=int(4.39e9), expert_products=0)
    position = sum(position_seconds(size, GPUS["h200"], 10_000))
    steps = [sum(sum(step_seconds(recipe, piece, 2048, GPUS["h200"])) for piece in held) for held in owners(recipe, 4)]
    assert max(steps) > 1.05 * sum(steps) / 4  # k weighs beside the dictionary: SAEs alone are less even
    busy = tuple(seconds * recipe.activations.window_tokens / 4096 / position for seconds in steps)
    draw = np.random.default_rng(5)
    for _ in range(20):
        lengths: list[int] = []
        while sum(lengths) < recipe.activations.window_tokens:
            lengths.append(int(np.clip(draw.lognormal(6.3, 0.9), 8, 2048)))
        batches = cut(lengths, recipe.corpus.batch_tokens, torch.device("cuda"))
        positions = [len(members) * lengths[members[0]] for members in batches]
        dealt = HarvestPlan(Group(0, 4), ((),) * 4, busy).deal(positions)
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
    recipe = three_saes(Path("model"))  # of 256, 192 and 64 latents
    delta, attn, small = "sae_delta", "sae_attn", "sae_delta_small"
    for count, expected in {
        1: [[delta, attn, small]],
        2: [[delta], [attn, small]],
        5: [[delta], [attn], [small], [], []],
    }.items():
        assert [[piece.stem for piece in held] for held in owners(recipe, count)] == expected


def test_each_layer_has_one_rank_that_speaks_for_it() -> None:
    layers = ((1, 3), (1,), (), (3, 5), (5,))
    assert [HarvestPlan(Group(rank, 5), layers, (0.0,) * 5).first_sites for rank in range(5)] == [
        (1, 3),
        (),
        (),
        (5,),
        (),
    ]
