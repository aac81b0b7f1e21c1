"""Metrics: metrics.jsonl always, TensorBoard, Weights & Biases and trackio on request.

A line of metrics.jsonl is {"step", "tokens", "saes": {id: {...}}, "left_out": {...}, "seconds", "tokens_per_second"};
but for the last two it is a pure function of the recipe, and a resumed run's file equals an uninterrupted one's.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qwenscope.errors import RecipeError
from qwenscope.files import disk_errors_named, write_text

logger = logging.getLogger(__name__)

WALL_CLOCK_FIELDS = ("seconds", "tokens_per_second")


@dataclass(frozen=True)
class SAEProgress:
    """How one SAE does: fraction of variance unexplained on the last batch looked at, share of dead latents."""

    fvu: float
    dead_share: float


@dataclass(frozen=True)
class Progress:
    """What a display needs; emitted on each change of phase and every `telemetry.log_every_steps` steps.

    Attributes:
        phase: "loading model", "calibrating", "resuming", "training", "closing" (inside the model), "saving" or
            "complete".
        tokens_per_second: 0 until measured.
        eta_seconds: None until measured.
    """

    phase: str
    tokens: int
    target: int
    tokens_per_second: float = 0.0
    eta_seconds: float | None = None
    saes: Mapping[str, SAEProgress] | None = None


OnProgress = Callable[[Progress], None]


class Sink(Protocol):
    """A further logger."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step."""

    def close(self) -> None:
        """Flush and end."""


class MetricsFile:
    """metrics.jsonl, appended line by line; lines that a full disk refuses wait in memory for the next attempt."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Open for a run that stands at `last_step`: later lines, and a line torn by a kill, are removed."""
        self._waiting: list[str] = []
        self._path = path
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = "".join(line for line in lines if _step_of(line) <= last_step)
            if kept != "".join(lines):
                write_text(path, kept)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; a full disk delays it."""
        self._waiting.append(json.dumps(_finite(record), allow_nan=False) + "\n")
        try:
            self._write()
        except OSError as error:
            logger.error("cannot write %s (%s); %d lines wait", self._path, error.strerror, len(self._waiting))

    def flush(self) -> None:
        """Write what waits and make it survive a power cut.

        Raises:
            ResourceError: the disk is still full.
        """
        with disk_errors_named(self._path, sum(map(len, self._waiting))):
            self._write()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; call `flush` first to be told of lines that could not be written."""
        self._file.close()

    def _write(self) -> None:
        data = "".join(self._waiting).encode()
        good = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            self._file.truncate(good)  # no torn line
            raise
        self._waiting.clear()


class Telemetry:
    """The metrics file and the recipe's sinks. A sink that fails is dropped, with an error in the log."""

    def __init__(self, run: Path, sinks: Sequence[str], config: Mapping[str, Any], last_step: int) -> None:
        self._sinks = {name: _SINKS[name](run, config, last_step) for name in sinks}
        self.file = MetricsFile(run / "metrics.jsonl", last_step)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write one record everywhere; sinks get its numbers under names such as `sae_attn_mid/fvu`."""
        self.file.append(record)
        values = dict(_numbers({**record["saes"], **{k: v for k, v in record.items() if k not in ("saes", "step")}}))
        for name in list(self._sinks):
            self._guarded(name, lambda sink: sink.log(record["step"], values))

    def close(self) -> None:
        """End all sinks and the file."""
        for name in list(self._sinks):
            self._guarded(name, lambda sink: sink.close())
        self.file.close()

    def _guarded(self, name: str, act: Any) -> None:
        try:
            act(self._sinks[name])
        except Exception as error:  # someone else's service: whatever it raises must not cost the run
            logger.error("telemetry sink %s failed and is dropped: %s", name, error)
            del self._sinks[name]


class _TensorBoard:
    def __init__(self, run: Path, config: Mapping[str, Any], last_step: int) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(run / "tensorboard"), purge_step=last_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracked:
    """Weights & Biases and trackio share one interface; a resumed run goes on under its folder's name."""

    def __init__(self, module: str, run: Path, config: Mapping[str, Any], **options: str) -> None:
        self._module = _import(module, module)
        self._module.init(project="qwenscope", name=run.name, config=dict(config), resume="allow", **options)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


def _wandb(run: Path, config: Mapping[str, Any], last_step: int) -> Sink:
    run = run.resolve()
    return _Tracked("wandb", run, config, id=run.name, dir=str(run))


def _trackio(run: Path, config: Mapping[str, Any], last_step: int) -> Sink:
    return _Tracked("trackio", run.resolve(), config)


_SINKS: dict[str, Callable[[Path, Mapping[str, Any], int], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise RecipeError(f"telemetry.sinks names {extra}, which is not installed; pip install {extra}") from None


def _step_of(line: str) -> float:
    """The step of a line, or infinity for one that is no whole record."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found.append((f"{prefix}{key}", float(value)))
    return found
