"""Does a killed run resume to the same bits on this very machine? `qwenscope doctor --self-test` asks here.

A short run on the packaged stand-in is trained twice: once without interruption, once killed (SIGKILL) in its middle
and resumed. Both happen in processes of their own, as a user's runs do.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qwenscope.errors import QwenscopeError
from qwenscope.files import sha256
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.training.folder import describe
from qwenscope.training.run import train

_OVERRIDES = (
    "lm.device=auto",
    "corpus.max_length=128",
    "corpus.batch_tokens=4096",
    "activations.window_tokens=2048",
    "training.tokens=8192",
    "training.batch_size=256",
    "training.warmup_steps=4",
    "training.calibration_tokens=1024",
    "training.resample_every_steps=8",
    "checkpoint.every_tokens=2560",
    "telemetry.log_every_steps=1",
)
_KILL_AT = 5000  # tokens: inside a window, between two checkpoints
_HOOKS = ("sae_delta_early", "sae_attn_early")


def self_test(folder: Path) -> dict[str, Any]:
    """Train, kill, resume and compare below `folder`.

    Returns:
        {"identical": bool, "detail": str, "killed_at": tokens, "resumed_from": checkpoint, "seconds": float,
        "sha256": {sae_id: [uninterrupted, resumed]}}

    Raises:
        QwenscopeError: a run failed; the message is its own.
    """
    began = time.monotonic()
    recipe = load_recipe("standin", _OVERRIDES)
    recipe = recipe.model_copy(update={"hook_points": {name: recipe.hook_points[name] for name in _HOOKS}})
    whole, killed = folder / "uninterrupted", folder / "killed"
    _finish(recipe, whole, resume=False)
    killed_at = _kill(recipe, killed)
    resumed_from = sorted(path.name for path in (killed / "checkpoints").glob("step-*"))[-1]
    _finish(recipe, killed, resume=True)
    hashes = {name: [sha256(run / "saes" / name / "weights.safetensors") for run in (whole, killed)] for name in _HOOKS}
    identical = all(one == other for one, other in hashes.values())
    killed_where = f"killed at {killed_at:,} of {recipe.training.tokens:,} tokens, resumed from {resumed_from}"
    ending = "the final weights have the same sha256" if identical else "the final weights differ"
    return {
        "identical": identical,
        "detail": f"{killed_where}: {ending}",
        "killed_at": killed_at,
        "resumed_from": resumed_from,
        "seconds": round(time.monotonic() - began, 1),
        "sha256": hashes,
    }


def _finish(recipe: Recipe, run: Path, *, resume: bool) -> None:
    process, told = _start(recipe, run, resume)
    messages = list(_received(told))
    process.join()
    if process.exitcode:
        problem = next((text for text in messages if isinstance(text, str)), f"exit code {process.exitcode}")
        raise QwenscopeError(f"self-test: training in {run} failed: {problem}")


def _kill(recipe: Recipe, run: Path) -> int:
    process, told = _start(recipe, run, resume=False)
    reached = 0
    for message in _received(told):
        if isinstance(message, str):
            raise QwenscopeError(f"self-test: training in {run} failed: {message}")
        if (reached := message) >= _KILL_AT:
            break
    process.kill()
    process.join()
    return reached


def _start(recipe: Recipe, run: Path, resume: bool) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(recipe.model_dump(mode="json"), run, resume, writer))
    process.start()
    writer.close()
    return process, reader


def _received(told: Connection) -> Iterator[Any]:
    with suppress(EOFError):
        while True:
            yield told.recv()


def _train(tree: dict[str, Any], run: Path, resume: bool, writer: Connection) -> None:
    """In the child: tell tokens as they are trained, or the error."""
    try:
        train(
            Recipe.model_validate(tree), run, resume=resume, on_progress=lambda progress: writer.send(progress.tokens)
        )
    except Exception as error:  # the parent says what it was
        writer.send(describe(error))
        raise SystemExit(1) from error
