"""SIGKILL at random instants and at every file operation of a save: the final weights are an uninterrupted run's."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import Reference, context, running, start_server, tiny_recipe

from qwenscope.recipe import Recipe
from qwenscope.training import checkpoint


def kill_and_resume(recipe: Recipe, run: Path, draw: random.Random) -> tuple[int, list[int]]:
    """Kill a run again and again at random instants until a session gets through.

    Returns the number of kills, and for each the tokens that had been trained, at least, and were lost.
    """
    reached, lost = 0, []
    for session in range(200):
        newest = checkpoint.list_checkpoints(run / "checkpoints")
        kept = checkpoint.load(newest[-1]).state["tokens"] if newest else 0
        if session:
            lost.append(reached - kept)
        with running(recipe, run, resume=session > 0) as child:
            patience = draw.randrange(16)
            for _, tokens in child.progress():
                reached = tokens
                if (patience := patience - 1) < 0:
                    break
            child.process.join(timeout=draw.random() * 0.06)
            if child.process.exitcode is not None:
                assert child.process.exitcode == 0, run.with_name(f"{run.name}.err").read_text()
                return session, lost
    raise AssertionError("200 sessions did not finish a run of 48 steps")


def campaign(kills: int, seed: int, model: Path, folder: Path, reference: Reference) -> list[int]:
    """Runs until `kills` SIGKILLs have been dealt; each run is checked. Returns tokens lost per kill."""
    draw, lost = random.Random(seed), []
    recipe = tiny_recipe(model)
    while len(lost) < kills:
        run = folder / f"run-{len(lost)}"
        lost += kill_and_resume(recipe, run, draw)[1]
        reference.check(run)
        shutil.rmtree(run)
    return lost


def test_fifteen_kills_change_nothing(tiny_model: Path, reference: Reference, tmp_path: Path) -> None:
    lost = campaign(15, 1, tiny_model, tmp_path, reference)
    # One interval, and what was trained while the save in flight was being written (never more than another).
    assert max(lost) <= 2 * tiny_recipe(tiny_model).checkpoint.every_tokens


@pytest.mark.slow
def test_a_hundred_kills_change_nothing(tiny_model: Path, reference: Reference, tmp_path: Path) -> None:
    lost = campaign(100, 2, tiny_model, tmp_path, reference)
    assert max(lost) <= 2 * tiny_recipe(tiny_model).checkpoint.every_tokens


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
