"""A run as it goes: a live panel on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:  # the rooms are imported where they are needed: `--help` answers at once
    from qwenscope.recipe import Recipe
    from qwenscope.training.telemetry import OnProgress
    from qwenscope.training.telemetry import Progress as RunProgress

_LINE_SECONDS = 15.0


def train_with_progress(recipe: Recipe, run: Path, resume: bool, console: Console) -> None:
    """Train and show it; a signal that stopped the run becomes its exit code.

    Raises:
        typer.Exit: stopped by a signal, with 128 + its number.
        QwenscopeError: as `train`.
    """
    from qwenscope.training.run import train
    from qwenscope.training.signals import Stopped

    began = time.monotonic()
    try:
        with _shown(console) as on_progress:
            train(recipe, run, resume=resume, on_progress=on_progress)
    except Stopped as stopped:
        console.print(str(stopped), highlight=False, markup=False)
        raise typer.Exit(stopped.exit_code) from None
    seconds = time.monotonic() - began
    console.print(
        f"{len(recipe.hook_points)} SAEs in {run / 'saes'}, {recipe.training.tokens:,} tokens each, {_clock(seconds)}",
        highlight=False,
        markup=False,
    )


@contextmanager
def phases(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show work that reports (phase, done, total): a bar per phase on a terminal; elsewhere a line when the phase
    changes and every quarter of a minute, with the time left."""
    bars = Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}
    lines = _Paced(console)

    def report(phase: str, done: int, total: int) -> None:
        if console.is_terminal:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)
        elif (seconds := lines.due(phase)) is not None:
            left = f"  {_clock(seconds * (total - done) / done)} left" if seconds and done else ""
            lines.print(f"{phase}  {done:,} of {total:,}{left}" if seconds else phase)

    with bars:
        yield report


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def _shown(console: Console) -> Iterator[OnProgress]:
    if console.is_terminal:
        panel = _Panel()
        with Live(panel, console=console, refresh_per_second=4):
            yield panel.update
    else:
        yield _Lines(console).update


class _Panel:
    """Bar, rate and time left, above one row per SAE."""

    def __init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            expand=True,
        )
        self._task = self._bar.add_task("starting", total=1, rate="")
        self._last: RunProgress | None = None

    def update(self, progress: RunProgress) -> None:
        self._last = progress
        rate = f"{progress.tokens_per_second:,.0f}/s"
        left = "" if progress.eta_seconds is None else f", {_clock(progress.eta_seconds)} left"
        self._bar.update(
            self._task,
            description=progress.phase,
            completed=progress.tokens,
            total=progress.target,
            rate=rate + left if progress.tokens_per_second else "",
        )

    def __rich__(self) -> RenderableType:
        if self._last is None or not self._last.saes:
            return self._bar
        table = Table(box=None, padding=(0, 3, 0, 0))
        table.add_column("SAE", style="dim")
        table.add_column("FVU", justify="right")
        table.add_column("dead", justify="right")
        for sae_id, sae in self._last.saes.items():
            table.add_row(sae_id, f"{sae.fvu:.4f}", f"{sae.dead_share:.1%}")
        return Group(self._bar, table)


class _Paced:
    """A line when the phase changes and every quarter of a minute: readable in a log file."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._began = self._printed = 0.0

    def due(self, phase: str) -> float | None:
        """Seconds since the phase began if it is time for a line, 0 for its first; else None."""
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._began = phase, now
        elif now - self._printed < _LINE_SECONDS:
            return None
        self._printed = now
        return now - self._began

    def print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)


class _Lines(_Paced):
    """A run's lines."""

    def update(self, progress: RunProgress) -> None:
        if self.due(progress.phase) is None:
            return
        line = f"{progress.phase:<14} {progress.tokens:>13,} of {progress.target:,} tokens"
        if progress.tokens_per_second:
            line += f"  {progress.tokens_per_second:,.0f}/s"
        if progress.eta_seconds is not None:
            line += f"  {_clock(progress.eta_seconds)} left"
        if progress.saes:
            fvu = sum(sae.fvu for sae in progress.saes.values()) / len(progress.saes)
            dead = sum(sae.dead_share for sae in progress.saes.values()) / len(progress.saes)
            line += f"  mean FVU {fvu:.4f}, dead {dead:.1%}"
        self.print(line)
