"""SIGKILLs at random instants, again and again, until a run gets through (tests/faults, bench/faults.py)."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tiny_run import Reference, running, tiny_recipe

from qwenscope.recipe import Recipe
from qwenscope.training import checkpoint


@dataclass(frozen=True)
class Kill:
    """Where one SIGKILL struck."""

    phase: str
    """The last that was heard of the run: loading model, calibrating, resuming, training, saving; or nothing."""
    reached: int
    """Tokens trained by then, at least."""
    kept: int
    """Tokens in the newest checkpoint that verifies."""
    save_torn: bool
    """A save was being written, or an old one removed."""

    @property
    def lost(self) -> int:
        """Tokens to train again."""
        return max(0, self.reached - self.kept)


def kill_until_done(recipe: Recipe, run: Path, draw: random.Random) -> list[Kill]:
    """Start and resume `run`, killing each session at a random instant, until one ends by itself, and well."""
    kills: list[Kill] = []
    for _ in range(200):
        phase, reached, patience = "nothing", 0, draw.randrange(16)
        with running(recipe, run, resume=bool(kills)) as child:
            for phase, reached in child.progress():  # noqa: B007 - the last ones are used below
                if (patience := patience - 1) < 0:
                    break
            child.process.join(timeout=draw.random() * 0.06)
            if child.process.exitcode is not None:
                assert child.process.exitcode == 0, run.with_name(f"{run.name}.err").read_text()
                return kills
        newest, passed_over = checkpoint.load_newest(run / "checkpoints")
        assert passed_over == []
        torn = any((run / "checkpoints").glob(".step-*")) if newest else False
        kills.append(Kill(phase, reached, newest.state["tokens"] if newest else 0, torn))
    raise AssertionError("200 sessions did not finish a run of 48 steps")


def campaign(kills: int, seed: int, model: Path, folder: Path, reference: Reference) -> Iterator[list[Kill]]:
    """Runs, each checked to the bit against `reference`, until `kills` SIGKILLs have been dealt; yields each run's."""
    draw, dealt = random.Random(seed), 0
    while dealt < kills:
        run = folder / "killed"
        struck = kill_until_done(tiny_recipe(model), run, draw)
        reference.check(run)
        shutil.rmtree(run)
        dealt += len(struck)
        yield struck
