"""SIGTERM, SIGINT and SIGUSR1 to a real process; the lock between two; who may enter a run folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from functools import partial
from pathlib import Path

import psutil
import pytest
from tiny_run import BATCH, STEPS, Child, Reference, metrics, running, status, tiny_recipe

from qwenscope.errors import LockError, ModelError, RecipeError
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.training import checkpoint, saver
from qwenscope.training.lock import run_lock
from qwenscope.training.run import train
from qwenscope.training.signals import SignalWatch


def rare_saves(model: Path) -> Recipe:
    """Only signals make checkpoints."""
    return tiny_recipe(model, checkpoint__every_tokens=10**9)


def until(child: Child, tokens: int) -> None:
    """Let the child train that far."""
    for _, reached in child.progress():
        if reached >= tokens:
            return
    raise AssertionError("the child ended early")


unless_nohup = pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN,
    reason="these tests run under nohup, whose children ignore SIGHUP",
)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), pytest.param(signal.SIGHUP, 129, marks=unless_nohup)],
)
def test_a_stop_signal_saves_and_the_rest_is_exact(
    tiny_model: Path, reference: Reference, tmp_path: Path, number: int, code: int
) -> None:
    recipe, run = rare_saves(tiny_model), tmp_path / "run"
    with running(recipe, run, resume=False) as child:
        until(child, 10 * BATCH)
        os.kill(child.process.pid or 0, number)
        assert child.wait() == code
    stopped = status(run)
    assert stopped["state"] == "stopped"
    assert 10 * BATCH <= stopped["tokens_trained"] < BATCH * (STEPS - 1)
    (kept,) = checkpoint.list_checkpoints(run / "checkpoints")
    assert checkpoint.load(kept).state["tokens"] == stopped["tokens_trained"]
    assert not (run / "saes").exists()
    with running(recipe, run, resume=True) as child:
        assert child.wait() == 0
    reference.check(run)


def test_sigusr1_saves_and_goes_on(tiny_model: Path, reference: Reference, tmp_path: Path) -> None:
    recipe, run = rare_saves(tiny_model), tmp_path / "run"
    with running(recipe, run, resume=False) as child:
        until(child, 6 * BATCH)
        os.kill(child.process.pid or 0, signal.SIGUSR1)
        assert child.wait() == 0
    first, last = checkpoint.list_checkpoints(run / "checkpoints")
    assert 6 <= int(first.name[5:]) < int(last.name[5:]) == STEPS
    reference.check(run)


@pytest.mark.slow
def test_workers_outlive_a_signal_to_all_and_no_killed_parent(
    tiny_model: Path, reference: Reference, tmp_path: Path
) -> None:
    recipe, run = tiny_recipe(tiny_model, corpus__workers=1), tmp_path / "run"
    with running(recipe, run, resume=False) as child:
        until(child, 10 * BATCH)
        everybody = [*psutil.Process(child.process.pid).children(), psutil.Process(child.process.pid)]
        assert len(everybody) > 1
        for process in everybody:
            process.terminate()
        assert child.wait() == 143
    with running(recipe, run, resume=True) as child:
        until(child, 20 * BATCH)
        workers = psutil.Process(child.process.pid).children()
        child.process.kill()
        assert psutil.wait_procs(workers, timeout=60)[1] == []
    with running(tiny_recipe(tiny_model), run, resume=True) as child:  # the number of workers is no part of the result
        assert child.wait() == 0
    reference.check(run)


def hang_in_save() -> None:
    """Saves never end."""
    saver.checkpoint.save = lambda *args: threading.Event().wait()


def test_a_second_signal_ends_at_once(tiny_model: Path, tmp_path: Path) -> None:
    with running(rare_saves(tiny_model), tmp_path / "run", resume=False, before=hang_in_save) as child:
        until(child, BATCH)
        os.kill(child.process.pid or 0, signal.SIGTERM)
        assert any(phase == "saving" for phase, _ in child.progress())
        os.kill(child.process.pid or 0, signal.SIGTERM)
        child.process.join()
        assert child.process.exitcode == -signal.SIGTERM


def test_handlers_are_the_callers_own_again_afterwards_and_threads_have_none() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with SignalWatch() as watch:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert watch.checkpoint
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.stop == signal.SIGINT
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before

    seen = []

    def enter() -> None:
        with SignalWatch():
            seen.append(signal.getsignal(signal.SIGTERM))

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's children ignore it
    with SignalWatch() as watch:
        for _ in range(3):  # a closing terminal may say so more than once
            os.kill(os.getpid(), signal.SIGHUP)
        assert watch.stop == signal.SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with SignalWatch() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.stop is None
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == before[:1]


def test_a_second_process_is_refused_with_pid_and_host(tiny_model: Path, tmp_path: Path) -> None:
    recipe, run = tiny_recipe(tiny_model), tmp_path / "run"
    with running(recipe, run, resume=False) as child:
        until(child, BATCH)
        os.kill(child.process.pid or 0, signal.SIGSTOP)
        state = (run / "status.json").read_bytes()
        with pytest.raises(LockError, match=rf"process {child.process.pid} on {socket.gethostname()}"):
            train(recipe, run, resume=True)
        assert (run / "status.json").read_bytes() == state


def test_a_fork_does_not_keep_the_lock_of_a_process_that_is_gone(tmp_path: Path) -> None:
    held, release = os.pipe(), os.pipe()
    holder = os.fork()
    if not holder:  # holds the lock, forks a worker that outlives it, dies without releasing
        with run_lock(tmp_path):
            if not os.fork():
                os.write(held[1], b"w")
                os.read(release[0], 1)
                os._exit(0)
            os._exit(0)
    os.waitpid(holder, 0)
    assert os.read(held[0], 1) == b"w"
    try:
        with run_lock(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
            with pytest.raises(LockError, match=f"process {os.getpid()}"), run_lock(tmp_path):
                pass
    finally:
        os.write(release[1], b"x")


def test_who_may_enter_a_folder(tiny_model: Path, tmp_path: Path) -> None:
    recipe, run = tiny_recipe(tiny_model, training__tokens=2 * BATCH, training__warmup_steps=0), tmp_path / "run"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    for resume in (False, True):
        with pytest.raises(RecipeError, match="holds no run"):
            train(recipe, tmp_path / "mine", resume=resume)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]

    train(recipe, run)
    record, stamp = metrics(run), status(run)
    with pytest.raises(RecipeError, match=r"already holds a run.*--resume"):
        train(recipe, run)
    train(recipe, run, resume=True)  # complete: nothing to do
    assert (metrics(run), status(run)) == (record, stamp)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_failed_before_its_first_step_does_not_hold_its_folder(
    tiny_model: Path, tmp_path: Path, resume: bool
) -> None:
    change, run = partial(tiny_recipe, tiny_model, training__tokens=2 * BATCH, training__warmup_steps=0), tmp_path / "r"
    with pytest.raises(ModelError, match="nowhere"):
        train(change(lm__model=str(tmp_path / "nowhere"), seed=6), run)
    assert status(run)["state"] == "failed"
    train(change(), run, resume=resume)
    assert status(run)["state"] == "complete"
    assert load_recipe(run / "recipe.yaml").seed == 5
    assert len(json.loads((run / "run.json").read_text())["sessions"]) == 1


def test_a_recipe_edited_between_runs_is_refused_and_harmless_keys_are_not(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    change = partial(tiny_recipe, tiny_model, training__tokens=3 * BATCH, training__warmup_steps=0)
    train(change(), run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(RecipeError, match=r"hook_points\.sae_attn\.k: 3 there, 4 now; seed: 5 there, 6 now"):
        train(change(seed=6, hook_points__sae_attn__k=4), run, resume=True)
    assert {path: path.read_bytes() for path in before} == before
    train(change(checkpoint__keep=1, telemetry__log_every_steps=5), run, resume=True)
