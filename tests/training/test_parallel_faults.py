"""Ranks that die, fail, are stopped, or are more or fewer than before: an honest end, and an exact way on."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_ranks
import torch
from tiny_ranks import complete, free_port, ranks, three_saes
from tiny_run import BATCH, Reference, final_hashes, metrics, status

from qwenscope.errors import ResourceError
from qwenscope.recipe import Recipe
from qwenscope.training import admission, checkpoint, trainer
from qwenscope.training.folder import open_run
from qwenscope.training.run import train

LOST = 12  # exit code of a rank that lost another


def uninterrupted(recipe: Recipe, run: Path) -> Reference:
    train(recipe, run)
    return Reference(final_hashes(run), metrics(run))


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return uninterrupted(three_saes(model), tmp_path_factory.mktemp("reference") / "run")


def rare_saves(model: Path) -> Recipe:
    """Only signals make checkpoints."""
    return three_saes(model, checkpoint__every_tokens=10**9)


def signal_itself(number: int, at_step: int, times: int = 1) -> None:
    """The rank meets a signal when an SAE of its own has done that many steps."""
    step = trainer.SAETrainer.step

    def interrupted(self: trainer.SAETrainer, x_BD: torch.Tensor, *_: None) -> Any:
        if self.steps == at_step:
            trainer.SAETrainer.step = step  # type: ignore[method-assign]
            for _ in range(times):
                os.kill(os.getpid(), number)
        return step(self, x_BD)

    trainer.SAETrainer.step = interrupted  # type: ignore[method-assign]


def test_stopped_on_two_ranks_resumed_on_one_then_on_four(model: Path, reference: Reference, tmp_path: Path) -> None:
    recipe, run = rare_saves(model), tmp_path / "run"
    twice = partial(signal_itself, signal.SIGTERM, 8, times=2)  # from the scheduler, and by way of torchrun
    with ranks(2, recipe, run, before={0: twice, 1: twice}) as job:
        assert job.wait() == [143, 143], job.errors()
    (first,) = checkpoint.list_checkpoints(run / "checkpoints")
    stopped = status(run)
    assert (stopped["state"], stopped["checkpoint"]) == ("stopped", first.name)
    steps = int(first.name.removeprefix("step-"))
    assert checkpoint.load(first).state["tokens"] == stopped["tokens_trained"] == steps * BATCH
    assert 8 < steps < 40
    with ranks(1, recipe, run, resume=True, before={0: partial(signal_itself, signal.SIGTERM, steps + 3)}) as job:
        assert job.wait() == [143]
    assert len(checkpoint.list_checkpoints(run / "checkpoints")) == 2
    complete(4, recipe, run, resume=True)
    reference.check(run)
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert [session["ranks"] for session in sessions] == [2, 1, 4]


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_ends_the_job_and_the_rest_is_exact(
    model: Path, reference: Reference, tmp_path: Path, victim: int
) -> None:
    recipe, run = three_saes(model), tmp_path / "run"
    with ranks(3, recipe, run, before={victim: partial(signal_itself, signal.SIGKILL, 20)}) as job:
        codes = job.wait()
        assert codes[victim] == -signal.SIGKILL
        assert [code for rank, code in enumerate(codes) if rank != victim] == [LOST, LOST], job.errors()
        assert "lost contact with another rank" in job.errors()
        assert "Traceback" not in job.errors()
    failed = status(run)
    assert failed["state"] == "failed"
    assert "lost contact with another rank" in failed["error"]
    newest, passed_over = checkpoint.load_newest(run / "checkpoints")
    assert newest is not None
    assert passed_over == []
    assert 0 < newest.state["tokens"] <= 20 * BATCH
    assert not (run / "saes").exists()
    complete(2, recipe, run, resume=True)
    reference.check(run)


def fail_at_step_20() -> None:
    """A bug, or a device out of memory."""
    step = trainer.SAETrainer.step

    def failing(self: trainer.SAETrainer, x_BD: torch.Tensor, *_: None) -> Any:
        if self.steps == 20:
            raise ArithmeticError("something of its own")
        return step(self, x_BD)

    trainer.SAETrainer.step = failing  # type: ignore[method-assign]


def nan_at_step_20() -> None:
    """Rows that are not finite, though they were harvested finite: the update is skipped, and the flag says so."""
    step = trainer.SAETrainer.step

    def poisoned(self: trainer.SAETrainer, x_BD: torch.Tensor, *_: None) -> Any:
        return step(self, x_BD * torch.nan if self.steps == 20 else x_BD)

    trainer.SAETrainer.step = poisoned  # type: ignore[method-assign]


def disk_full() -> None:
    """No room for this rank's files."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint._write_tensors = refuse  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("before", "code", "said"),
    [
        (fail_at_step_20, 1, "rank 1: ArithmeticError: something of its own"),
        (nan_at_step_20, 6, "rank 1: sae_attn: loss or gradient is not finite at step 21"),
        (disk_full, 10, "rank 1: no space left for "),
    ],
)
def test_status_says_what_failed_on_another_rank(
    model: Path, tmp_path: Path, before: Any, code: int, said: str
) -> None:
    run = tmp_path / "run"
    with ranks(2, three_saes(model), run, before={1: before}) as job:
        codes = job.wait()
    assert codes == [code if code != 1 else LOST, code], job.errors()
    assert status(run)["state"] == "failed"
    assert said in status(run)["error"]
    assert not (run / "saes").exists()


def test_a_signal_to_one_rank_stops_all_and_an_occupied_folder_refuses_all(model: Path, tmp_path: Path) -> None:
    recipe, run = rare_saves(model), tmp_path / "run"
    with ranks(2, recipe, run, before={0: partial(signal_itself, signal.SIGSTOP, 6)}) as job:
        job.until(4 * BATCH)
        with ranks(2, recipe, run, resume=True) as second:
            assert second.wait() == [8, 8]
            assert f"process {job.processes[0].pid} on " in second.errors()
        os.kill(job.processes[0].pid or 0, signal.SIGCONT)
        job.processes[1].terminate()
        assert job.wait() == [143, 143]
    assert status(run)["state"] == "stopped"


def another_seed() -> None:
    """This machine has another recipe under the same name."""
    load = tiny_ranks.load_recipe
    tiny_ranks.load_recipe = lambda path: load(path, ["seed=6"])  # type: ignore[assignment]


def other_weights() -> None:
    """This machine has another model under the same name."""
    load = admission.load_language_model

    def changed(*args: Any, **options: Any) -> Any:
        lm = load(*args, **options)
        lm.model.get_input_embeddings().weight.mul_(1.5)
        return lm

    admission.load_language_model = changed


@pytest.mark.parametrize(
    ("before", "code", "said"),
    [
        (another_seed, 3, "the ranks were started with unlike recipes"),
        (other_weights, 4, "residual stream on rank 1 differs from rank 0's"),
    ],
)
def test_ranks_that_are_not_alike_are_refused(model: Path, tmp_path: Path, before: Any, code: int, said: str) -> None:
    run = tmp_path / "run"
    with ranks(2, three_saes(model), run, before={1: before}) as job:
        assert job.wait() == [code, code], job.errors()
        assert said in job.errors()
    assert not (run / "checkpoints").exists()


def test_a_folder_that_a_rank_does_not_see_is_named(model: Path, tmp_path: Path) -> None:
    """Rank 1 of two machines that share nothing: its own folder has no lock, or another's."""

    class Elsewhere:
        leads = False

        def broadcast_object(self, _: Any) -> dict[str, Any]:
            return {"pid": 1, "host": "far-away"}

        def all_gather_object(self, act: Any) -> list[Any]:
            return [act()]

    for folder in (tmp_path / "none", tmp_path):
        (tmp_path / ".lock").write_text(json.dumps({"pid": 2, "host": "here"}))
        with (
            pytest.raises(ResourceError, match="another folder here than on rank 0"),
            open_run(three_saes(model), folder, False, Elsewhere()),  # type: ignore[arg-type]
        ):
            pass


# -- torchrun ---------------------------------------------------------------------------------------------------------


def long_run(model: Path) -> Recipe:
    """Long enough to be met in the middle from outside."""
    return three_saes(model, training__tokens=400 * BATCH)


@pytest.fixture(scope="module")
def long_reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return uninterrupted(long_run(model), tmp_path_factory.mktemp("long") / "run")


TWO_RANKS = ("--standalone", "--nproc-per-node", "2")


class Launched:
    """One job of the real launcher, on one machine or, an agent each, on what stands for several."""

    def __init__(self, recipe: Recipe, run: Path) -> None:
        self.run = run
        self._recipe = run.with_name("recipe.yaml")
        self._recipe.write_text(recipe.to_yaml())
        self._port = free_port()
        self.agents: list[subprocess.Popen[str]] = []

    def start(self, *options: str, resume: bool = False, **environment: str) -> subprocess.Popen[str]:
        """torchrun with these options."""
        launcher = [sys.executable, "-m", "torch.distributed.run", *options, "--max-restarts", "2"]
        train_run = ["train", str(self._recipe), "--out", str(self.run), *(["--resume"] if resume else [])]
        agent = subprocess.Popen(
            [*launcher, "-m", "qwenscope", *train_run],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.agents.append(agent)
        return agent

    def start_machine(self, host: bool) -> subprocess.Popen[str]:
        """A machine with one rank, of one or two; `host`: the one where they meet."""
        conf = f"is_host={str(host).lower()},last_call_timeout=1,keep_alive_interval=1"
        return self.start(
            *("--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "job"),
            *("--rdzv-endpoint", f"127.0.0.1:{self._port}", "--local-addr", "127.0.0.1", "--rdzv-conf", conf),
            resume=True,
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )

    def until_saved(self, agent: subprocess.Popen[str]) -> None:
        """Wait for the first checkpoint."""
        while not (self.run / "checkpoints" / "step-00000006").exists():
            with suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"torchrun ended with {agent.wait(0.05)} before its first checkpoint")

    def ranks(self) -> list[int]:
        """How many there were, session by session."""
        return [session["ranks"] for session in json.loads((self.run / "run.json").read_text())["sessions"]]


def workers(agent: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(agent.pid).children()


def lose_machine(agent: subprocess.Popen[str]) -> None:
    """Its agent and its ranks are gone at once."""
    for process in (*workers(agent), psutil.Process(agent.pid)):
        process.kill()


def ended(agent: subprocess.Popen[str]) -> int:
    """The agent's exit code; its last words where a test fails."""
    _, errors = agent.communicate(timeout=180)
    print(errors[-4000:])
    return agent.returncode


@pytest.fixture
def job(model: Path, tmp_path: Path) -> Iterator[Launched]:
    launched = Launched(long_run(model), tmp_path / "run")
    yield launched
    for agent in launched.agents:
        agent.terminate()  # it ends its workers
        agent.wait(timeout=60)


@pytest.mark.slow
def test_torchrun_restarts_and_resumes_by_itself(job: Launched, long_reference: Reference) -> None:
    agent = job.start(*TWO_RANKS)
    job.until_saved(agent)
    next(worker for worker in workers(agent) if worker.environ().get("RANK") == "1").kill()
    assert ended(agent) == 0
    assert job.ranks() == [2, 2]
    long_reference.check(job.run)


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_ranks_with_a_checkpoint(
    model: Path, job: Launched, long_reference: Reference
) -> None:
    agent = job.start(*TWO_RANKS)
    job.until_saved(agent)
    agent.terminate()
    assert ended(agent) != 0
    stopped = status(job.run)
    assert stopped["state"] == "stopped"
    newest, _ = checkpoint.load_newest(job.run / "checkpoints")
    assert newest is not None
    assert newest.state["tokens"] == stopped["tokens_trained"]
    train(long_run(model), job.run, resume=True)
    long_reference.check(job.run)


@pytest.mark.slow
def test_the_machines_that_are_left_go_on_without_a_lost_one(job: Launched, long_reference: Reference) -> None:
    stays, lost = job.start_machine(host=True), job.start_machine(host=False)
    job.until_saved(stays)
    lose_machine(lost)
    assert ended(stays) == 0
    assert job.ranks() == [2, 1]
    long_reference.check(job.run)


@pytest.mark.slow
def test_a_machine_that_comes_later_takes_its_part(job: Launched, long_reference: Reference) -> None:
    first = job.start_machine(host=True)
    job.until_saved(first)
    second = job.start_machine(host=False)
    assert [ended(first), ended(second)] == [0, 0]
    assert job.ranks() == [1, 2]
    long_reference.check(job.run)


@pytest.mark.slow
def test_without_the_machine_where_they_meet_the_job_ends_and_resumes(
    model: Path, job: Launched, long_reference: Reference
) -> None:
    host, other = job.start_machine(host=True), job.start_machine(host=False)
    job.until_saved(host)
    lose_machine(host)
    assert ended(other) != 0
    assert status(job.run)["state"] == "failed"
    train(long_run(model), job.run, resume=True)
    long_reference.check(job.run)
