"""SIGKILL at random instants and at every file operation of a save: the final weights are an uninterrupted run's."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_kills import campaign
from tiny_run import Reference, context, start_server, tiny_recipe

from qwenscope.training import checkpoint


def deal(kills: int, seed: int, model: Path, folder: Path, reference: Reference) -> None:
    struck = [kill for run in campaign(kills, seed, model, folder, reference) for kill in run]
    assert len(struck) >= kills
    # One interval, and what was trained while the save in flight was being written (never more than another).
    assert max(kill.lost for kill in struck) <= 2 * tiny_recipe(model).checkpoint.every_tokens


def test_six_kills_change_nothing(tiny_model: Path, reference: Reference, tmp_path: Path) -> None:
    deal(6, 1, tiny_model, tmp_path, reference)


@pytest.mark.slow
def test_a_hundred_kills_change_nothing(tiny_model: Path, reference: Reference, tmp_path: Path) -> None:
    deal(100, 2, tiny_model, tmp_path, reference)


OPERATIONS = ((os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"))


def save_and_die(folder: Path, operation: int) -> None:
    """Save step 3 over steps 1 and 2 with keep=2, killed before file operation number `operation`."""
    count = 0

    def counted(real: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == operation:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    for module, name in OPERATIONS:
        setattr(module, name, functools.partial(counted, getattr(module, name)))
    checkpoint.save(folder, 3, {"step": 3}, {"a": {"w": torch.full((9,), 3.0)}, "b": {"w": torch.zeros(2)}})
    checkpoint.rotate(folder, keep=2)


def test_a_kill_before_any_file_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    start_server()
    found, survived = [], 0
    for operation in range(1, 60):
        folder = tmp_path / str(operation)
        for step in (1, 2):
            checkpoint.save(folder, step, {"step": step}, {"a": {"w": torch.full((9,), float(step))}})
        process = context.Process(target=save_and_die, args=(folder, operation))
        process.start()
        process.join()
        newest, passed_over = checkpoint.load_newest(folder)
        assert newest is not None
        assert passed_over == []
        assert torch.equal(newest.tensors["a"]["w"], torch.full((9,), float(newest.state["step"])))
        found.append(newest.state["step"])
        checkpoint.rotate(folder, keep=2)
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
        if process.exitcode == 0:
            survived += 1
            break
        assert process.exitcode == -signal.SIGKILL
    assert survived == 1, "there are more operations than were tried"
    assert found == sorted(found)
    assert set(found) == {2, 3}
