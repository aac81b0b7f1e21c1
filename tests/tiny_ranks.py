"""Tiny runs on several ranks: real processes that meet over gloo, forked from the server of `tiny_run`.

Each rank writes down what it did: the batches that its language model ran, the tokens that its SAEs were trained on,
the kept tokens that each rank harvested, and the bytes it handed to torch.distributed.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_run import context, start_server, tiny_recipe

from qwenscope.activations import harvest, windows
from qwenscope.errors import QwenscopeError
from qwenscope.files import write_text
from qwenscope.parallel.group import Group
from qwenscope.parallel.harvest_plan import HarvestPlan
from qwenscope.parallel.launch import joined
from qwenscope.recipe import HookPoint, Recipe, load_recipe
from qwenscope.training.run import train
from qwenscope.training.signals import Stopped

Before = Callable[[], None]


def three_saes(model: Path, **changes: Any) -> Recipe:
    """`tiny_recipe` with a second, smaller SAE at layer 1."""
    recipe = tiny_recipe(model, **changes)
    third = HookPoint(layer=1, kind="deltanet", dict_size=64, k=2, lr=2e-3)
    return recipe.model_copy(update={"hook_points": {**recipe.hook_points, "sae_delta_small": third}})


class Ranks:
    """The processes of one job; `before` runs in each rank, or only in those of a {rank: function}."""

    def __init__(
        self, size: int, recipe: Recipe, run: Path, *, resume: bool = False, before: dict[int, Before] | None = None
    ) -> None:
        path = run.with_name(f"{run.name}.recipe.yaml")
        write_text(path, recipe.to_yaml())
        start_server()
        self._run = run
        self._reader, writer = context.Pipe(duplex=False)
        environment = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = [
            context.Process(
                target=_rank,
                args=(path, run, resume, {**environment, "RANK": str(rank)}, writer, (before or {}).get(rank)),
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()
        writer.close()

    def until(self, tokens: int) -> None:
        """Let rank 0 train that far."""
        try:
            while self._reader.recv() < tokens:
                pass
        except EOFError:
            raise AssertionError(f"the job ended early: {self.errors()}") from None

    def wait(self) -> list[int | None]:
        """Exit codes by rank, after the end."""
        for process in self.processes:
            process.join(timeout=120)
        return [process.exitcode for process in self.processes]

    def errors(self) -> str:
        """What all ranks wrote to stderr."""
        return "\n".join(path.read_text() for path in sorted(self._run.parent.glob(f"{self._run.name}.rank-*.err")))

    def did(self) -> list[dict[str, Any]]:
        """What each rank wrote down: batches, tokens, harvested, sent, read."""
        paths = [self._run.with_name(f"{self._run.name}.rank-{rank}.json") for rank in range(len(self.processes))]
        return [json.loads(path.read_text()) for path in paths]


@contextmanager
def ranks(
    size: int, recipe: Recipe, run: Path, *, resume: bool = False, before: dict[int, Before] | None = None
) -> Iterator[Ranks]:
    """A job whose processes are gone when the block ends."""
    job = Ranks(size, recipe, run, resume=resume, before=before)
    try:
        yield job
    finally:
        for process in job.processes:
            process.kill()
            process.join()


def complete(size: int, recipe: Recipe, run: Path, *, resume: bool = False) -> list[dict[str, Any]]:
    """Run a job to its end -> what each rank did."""
    with ranks(size, recipe, run, resume=resume) as job:
        assert job.wait() == [0] * size, job.errors()
        return job.did()


def on_ranks(size: int, act: Callable[[Group], None]) -> None:
    """Let `act` (picklable) run on ranks that have joined, to its end."""
    start_server()
    environment = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [context.Process(target=_act, args=(act, {**environment, "RANK": str(rank)})) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size


def _act(act: Callable[[Group], None], environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    with joined("cpu") as group:
        act(group)


def _rank(
    recipe: Path, run: Path, resume: bool, environment: dict[str, str], writer: Connection, before: Before | None
) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    rank = environment["RANK"] if environment["WORLD_SIZE"] != "1" else "0"
    sys.stderr = open(run.with_name(f"{run.name}.rank-{rank}.err"), "a")  # noqa: SIM115 - as long as the process lives
    os.dup2(sys.stderr.fileno(), 2)
    did = _observe()
    if before is not None:
        before()
    try:
        train(load_recipe(recipe), run, resume=resume, on_progress=lambda progress: writer.send(progress.tokens))
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    except QwenscopeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    run.with_name(f"{run.name}.rank-{rank}.json").write_text(json.dumps(did))


def _observe() -> dict[str, Any]:
    """Note what passes through the language model, to owners, into training and through all_to_all."""
    size = int(os.environ["WORLD_SIZE"])
    did: dict[str, Any] = {"batches": [], "tokens": [], "sent": 0, "harvested": [0] * size, "read": 0}
    forward, next_batch, all_to_all = harvest._forward, windows.Windows.next_batch, dist.all_to_all_single
    rows_to_owners = HarvestPlan.rows_to_owners

    def noted_forward(lm: Any, batches: Any, *rest: Any) -> Any:
        did["batches"] += [hashlib.sha256(batch.input_ids_CT.numpy().tobytes()).hexdigest() for batch in batches]
        return forward(lm, batches, *rest)

    def noted_batch(self: windows.Windows, size: int) -> Any:
        batch = next_batch(self, size)
        did["tokens"] += self.last_tokens()
        did["read"] = self.tokens_read
        return batch

    def noted_rows(self: HarvestPlan, rows: Any, rank_R: torch.Tensor) -> Any:
        counts = torch.bincount(rank_R, minlength=size).tolist()
        did["harvested"] = [before + now for before, now in zip(did["harvested"], counts, strict=True)]
        return rows_to_owners(self, rows, rank_R)

    def noted_all_to_all(output: Any, rows: torch.Tensor, receive: Any, send: list[int], *rest: Any) -> Any:
        did["sent"] += sum(count for to, count in enumerate(send) if to != dist.get_rank()) * rows[:1].nbytes
        return all_to_all(output, rows, receive, send, *rest)

    harvest._forward, windows.Windows.next_batch = noted_forward, noted_batch
    HarvestPlan.rows_to_owners, dist.all_to_all_single = noted_rows, noted_all_to_all
    return did


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
