"""A run small enough to be started, killed and resumed many times: a tiny random language model, two SAEs, 48 steps.

Runs happen in processes of their own, forked from a server that has imported everything: a start costs a fraction of a
second, and a SIGKILL is a real one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import Qwen3_5MoeForCausalLM

from qwenscope.corpus.tool_use import tool_use_conversation
from qwenscope.errors import QwenscopeError
from qwenscope.files import write_text
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.sae.sae import TopKSAE
from qwenscope.training.run import train
from qwenscope.training.signals import Stopped
from qwenscope.training.telemetry import WALL_CLOCK_FIELDS, Progress

BATCH, STEPS = 64, 48

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__])


@functools.cache
def start_server() -> None:
    """Start the process that imports everything once; it needs to be told where this module is."""
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, path))):
        forkserver.ensure_running()


def make_language_model(folder: Path) -> Path:
    """A random 4-layer Qwen3.5-MoE (DeltaNet, DeltaNet, DeltaNet, attention) with a chat tokenizer of 512 ids."""
    from standin.data import train_tokenizer  # here: processes that only train do not have bench/ on their path
    from standin.model import standin_config

    texts = [json.dumps(tool_use_conversation(7, index)["messages"]) for index in range(60)]
    tokenizer = train_tokenizer(texts, 512)
    torch.manual_seed(3)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = standin_config(512, num_hidden_layers=4, hidden_size=32, linear_key_head_dim=16, linear_value_head_dim=16)
    config.update(ids)
    Qwen3_5MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_recipe(model: Path, **changes: Any) -> Recipe:
    """Two hook points, three windows, resampling, a snapshot; `changes` are dotted keys with __ for the dot."""
    tree: dict[str, Any] = {
        "seed": 5,
        "lm": {"model": str(model), "dtype": "float32", "device": "cpu"},
        "hook_points": {
            "sae_delta": {"layer": 1, "kind": "deltanet", "dict_size": 256, "k": 2, "lr": 2e-3},
            "sae_attn": {"layer": 3, "kind": "attention", "dict_size": 192, "k": 3, "lr": 2e-3},
        },
        "corpus": {"max_length": 128, "batch_tokens": 512, "sources": [{"name": "tool_use", "weight": 1.0}]},
        "activations": {"window_tokens": 1000},
        "training": {
            "tokens": BATCH * STEPS - 10,  # the last batch is a smaller one
            "batch_size": BATCH,
            "warmup_steps": 4,
            "calibration_tokens": 256,
            "dead_after_tokens": 256,
            "resample_every_steps": 10,
            "normalise": True,
        },
        "checkpoint": {"every_tokens": BATCH * 3, "every_minutes": None, "keep": 2},
        "telemetry": {"log_every_steps": 2},
    }
    for key, value in changes.items():
        node = tree
        *parents, last = key.split("__")
        for part in parents:
            node = node[part]
        node[last] = value
    return Recipe.model_validate(tree)


def make_suite(folder: Path, model: Path, seed: int) -> Path:
    """A complete run with random SAEs of the tiny recipe."""
    recipe = tiny_recipe(model)
    for sae_id, point in recipe.hook_points.items():
        sae = TopKSAE(32, point.dict_size, point.k, seed=seed)
        sae.config |= {"layer": point.layer}
        sae.save(folder / "saes" / sae_id)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "status.json").write_text('{"state": "complete"}')
    return folder


def final_hashes(run: Path) -> dict[str, str]:
    """sha256 of every file below saes/."""
    return {
        str(path.relative_to(run / "saes")): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run / "saes").rglob("*"))
        if path.is_file()
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its wall-clock fields."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in WALL_CLOCK_FIELDS} for record in records]


def status(run: Path) -> dict[str, Any]:
    """status.json."""
    read: dict[str, Any] = json.loads((run / "status.json").read_text())
    return read


@dataclass(frozen=True)
class Reference:
    """What an uninterrupted run of `tiny_recipe` leaves."""

    hashes: dict[str, str]
    metrics: list[dict[str, Any]]

    def check(self, run: Path) -> None:
        """Assert that `run` ended the same, to the bit."""
        assert status(run)["state"] == "complete", status(run)
        assert final_hashes(run) == self.hashes
        assert metrics(run) == self.metrics


def make_reference(model: Path, run: Path) -> Reference:
    """Train without interruption, in this process."""
    train(tiny_recipe(model), run)
    found = Reference(final_hashes(run), metrics(run))
    assert len(found.hashes) == 6
    assert any(
        sae["dead"] > 0 for record in found.metrics for sae in record["saes"].values()
    )  # aux-k, resampling at work
    return found


class Child:
    """A real process that trains; it reports each progress, and dies without a trace when killed."""

    def __init__(self, recipe: Recipe, run: Path, *, resume: bool, before: Callable[[], None] | None = None) -> None:
        path = run.with_name(f"{run.name}.recipe.yaml")
        if not path.exists():
            write_text(path, recipe.to_yaml())
        start_server()
        self._reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(target=_train, args=(path, run, resume, writer, before))
        self.process.start()
        writer.close()

    def progress(self) -> Iterator[tuple[str, int]]:
        """(phase, tokens) as they happen, until the process ends."""
        with suppress(EOFError):
            while True:
                yield self._reader.recv()

    def wait(self) -> int:
        """Exit code, after the end."""
        for _ in self.progress():
            pass
        self.process.join()
        self._reader.close()
        code = self.process.exitcode
        assert code is not None
        return code


@contextmanager
def running(recipe: Recipe, run: Path, *, resume: bool, before: Callable[[], None] | None = None) -> Iterator[Child]:
    """A `Child` that is gone when the block ends."""
    child = Child(recipe, run, resume=resume, before=before)
    try:
        yield child
    finally:
        child.process.kill()
        child.process.join()


def _train(recipe: Path, run: Path, resume: bool, writer: Connection, before: Callable[[], None] | None = None) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(run.with_name(f"{run.name}.err"), "a")  # noqa: SIM115 - as long as the process lives
    os.dup2(sys.stderr.fileno(), 2)
    if before is not None:
        before()
    try:
        train(load_recipe(recipe), run, resume=resume, on_progress=lambda p: _tell(writer, p))
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    except QwenscopeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _tell(writer: Connection, progress: Progress) -> None:
    writer.send((progress.phase, progress.tokens))
