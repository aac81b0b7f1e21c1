"""A run folder that is moved, deleted or replaced under way; a run that only says it is complete; a closed terminal."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import BATCH, final_hashes, metrics, status, tiny_recipe

from qwenscope.errors import CheckpointError, QwenscopeError, ResourceError
from qwenscope.recipe import Recipe
from qwenscope.training import checkpoint
from qwenscope.training.run import train
from qwenscope.training.telemetry import Progress


@pytest.fixture(scope="module")
def short(tiny_model: Path) -> Recipe:
    return tiny_recipe(tiny_model, training__tokens=13 * BATCH - 10, training__resample_every_steps=5)


@pytest.fixture(scope="module")
def whole(short: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(short, run)
    return run


def replace(run: Path) -> None:
    run.rename(run.with_name("moved"))
    run.mkdir()


STRIKES: dict[str, Callable[[Path], object]] = {
    "run moved": lambda run: run.rename(run.with_name("moved")),
    "run deleted": shutil.rmtree,
    "run replaced": replace,
    "checkpoints moved": lambda run: (run / "checkpoints").rename(run / "mine"),
    "checkpoints deleted": lambda run: shutil.rmtree(run / "checkpoints"),
}


@pytest.mark.parametrize("strike", STRIKES)
@pytest.mark.parametrize(
    ("tokens", "saved"), [(4 * BATCH, [3]), (13 * BATCH - 10, [9, 12])], ids=["half-way", "at the end"]
)
def test_a_folder_that_goes_under_way_ends_the_run_in_one_line(
    short: Recipe, tmp_path: Path, strike: str, tokens: int, saved: list[int]
) -> None:
    run = tmp_path / "run"
    names = {f"step-{step:08d}" for step in saved}

    def on_progress(progress: Progress) -> None:
        if progress.phase == "training" and progress.tokens == tokens:
            while {path.name for path in (run / "checkpoints").glob("*")} != names:
                pass  # a save is in flight, or about to make the folder
            STRIKES[strike](run)

    with pytest.raises(QwenscopeError) as caught:
        train(short, run, on_progress=on_progress)
    assert isinstance(caught.value, CheckpointError | ResourceError)
    assert str(run) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    if "run" in strike:  # nothing is written anew in its place
        assert not run.exists() or list(run.iterdir()) == []
    else:
        assert status(run)["state"] == "failed"
        assert not (run / "saes").exists()


def test_a_moved_folder_is_brought_back_and_gone_on_from(short: Recipe, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def on_progress(progress: Progress) -> None:
        if progress.phase == "training" and progress.tokens == 4 * BATCH:
            run.rename(run.with_name("moved"))

    with pytest.raises(QwenscopeError):
        train(short, run, on_progress=on_progress)
    run.with_name("moved").rename(run)
    train(short, run, resume=True)
    assert final_hashes(run) == final_hashes(whole)
    assert metrics(run) == metrics(whole)


@pytest.mark.parametrize("damage", ["flip", "missing", "all"])
def test_a_run_that_only_says_it_is_complete_is_ended_again(
    short: Recipe, whole: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    weights = run / "saes" / "sae_attn" / "weights.safetensors"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
    elif damage == "missing":
        weights.unlink()
    else:
        shutil.rmtree(run / "saes")
    train(short, run, resume=True)
    assert "is not complete though it says so" in caplog.text
    assert status(run)["state"] == "complete"
    assert final_hashes(run) == final_hashes(whole)


def test_where_nothing_is_left_to_end_it_from_the_run_says_so(short: Recipe, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    for name in ("saes", "checkpoints"):
        shutil.rmtree(run / name)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint, but status\.json knows of step-00000013"):
        train(short, run, resume=True)
    assert status(run)["state"] != "complete"


def test_leftovers_of_a_killed_save_go_at_the_start(short: Recipe, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    kept = checkpoint.list_checkpoints(run / "checkpoints")
    for name in (".step-00000003.old", ".step-00000099.tmp"):
        shutil.copytree(kept[0], run / "checkpoints" / name)
    shutil.copytree(run / "saes", run / ".saes.tmp")
    train(short, run, resume=True)  # complete: nothing to do, but to tidy up
    assert sorted((run / "checkpoints").iterdir()) == kept
    assert [path.name for path in run.glob(".*")] == [".lock"]


def test_a_terminal_that_is_gone_costs_the_display_not_the_run(
    short: Recipe, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = []

    def on_progress(progress: Progress) -> None:
        shown.append(progress.phase)
        if progress.phase == "training":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    train(short, tmp_path / "run", on_progress=on_progress)
    assert shown.count("training") == 1
    assert "progress is shown no longer (Input/output error)" in caplog.text
    assert final_hashes(tmp_path / "run") == final_hashes(whole)
