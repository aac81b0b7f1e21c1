"""A disk that fills up, on a small tmpfs: at every page of a save, in the middle of a run, and at its end."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import BATCH, Reference, status, tiny_recipe

from qwenscope.errors import ResourceError
from qwenscope.training import checkpoint
from qwenscope.training.run import train
from qwenscope.training.telemetry import Progress

PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Take all space but `leave` bytes (whole pages)."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    size = shutil.disk_usage(disk).free - leave
    with filler.open("wb") as file:
        file.write(bytes(max(0, size)))


def outcome_of_save(folder: Path, tensors: dict[str, dict[str, torch.Tensor]]) -> str:
    """ "saved", or the message."""
    try:
        checkpoint.save(folder, 2, {"step": 2}, tensors)
    except ResourceError as error:
        return str(error)
    return "saved"


def test_a_save_that_runs_out_at_any_page_leaves_the_old_checkpoint(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = disk / "checkpoints"
    tensors = {name: {"w": torch.randn(5000), "m": torch.randn(5000)} for name in ("a", "b")}
    old = checkpoint.save(folder, 1, {"step": 1}, tensors)
    roomy = shutil.disk_usage(disk)._replace(free=1 << 40)
    outcomes = []
    for pages in range(40):  # another process fills the disk after we have looked at it
        fill(disk, pages * PAGE)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: roomy)
            outcomes.append(outcome_of_save(folder, tensors))
        if outcomes[-1] == "saved":
            assert checkpoint.load(folder / "step-00000002").state == {"step": 2}
            shutil.rmtree(folder / "step-00000002")
        assert list(folder.iterdir()) == [old]
        assert checkpoint.load(old).state == {"step": 1}
    refused = [outcome for outcome in outcomes if outcome != "saved"]
    assert outcomes == refused + ["saved"] * (len(outcomes) - len(refused))
    assert 15 < len(refused) < len(outcomes)
    assert all(f"{checkpoint.checkpoint_bytes(tensors):,} bytes needed" in message for message in refused)


def test_a_run_goes_on_over_a_full_disk_and_catches_up(
    disk: Path, tiny_model: Path, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    run, notes = disk / "run", []

    def on_progress(progress: Progress) -> None:
        if progress.phase == "training" and progress.tokens == 10 * BATCH:
            fill(disk, leave=0)
        if progress.phase == "training" and progress.tokens == 30 * BATCH:
            notes.append([path.name for path in checkpoint.list_checkpoints(run / "checkpoints")])
            (disk / "filler").unlink()

    train(tiny_recipe(tiny_model), run, on_progress=on_progress)
    assert notes == [["step-00000006", "step-00000009"]] or notes == [["step-00000003", "step-00000006"]]
    assert "bytes needed" in caplog.text
    reference.check(run)


def test_a_disk_still_full_at_the_end_is_an_honest_failure(disk: Path, tiny_model: Path, reference: Reference) -> None:
    run = disk / "run"

    def on_progress(progress: Progress) -> None:
        if progress.phase == "training" and progress.tokens == 40 * BATCH:
            fill(disk, leave=4 * PAGE)  # room for a status, not for a checkpoint

    with pytest.raises(ResourceError, match=r"no space left for .*bytes needed"):
        train(tiny_recipe(tiny_model), run, on_progress=on_progress)
    assert status(run)["state"] == "failed"
    assert "bytes needed" in status(run)["error"]
    assert not (run / "saes").exists()
    newest, passed_over = checkpoint.load_newest(run / "checkpoints")
    assert newest is not None
    assert passed_over == []
    (disk / "filler").unlink()
    train(tiny_recipe(tiny_model), run, resume=True)
    reference.check(run)


def test_no_room_for_the_first_checkpoint_ends_the_run(disk: Path, tiny_model: Path) -> None:
    run = disk / "run"

    def on_progress(progress: Progress) -> None:
        if progress.phase == "training" and progress.tokens == 2 * BATCH:
            fill(disk, leave=8 * PAGE)

    with pytest.raises(ResourceError, match=r"no space left for .*step-00000003.* bytes needed"):
        train(tiny_recipe(tiny_model), run, on_progress=on_progress)
    assert status(run)["state"] == "failed"
    assert status(run)["tokens_trained"] < 12 * BATCH
