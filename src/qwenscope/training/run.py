"""Drive the walk: conversations -> windows -> one step of every SAE, saved, watched, resumed, and honestly ended.

`qwenscope train RECIPE --out RUN` is `train(load_recipe(RECIPE), RUN)`. docs/checkpoints.md says what is promised.
"""

from __future__ import annotations

import base64
import logging
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from qwenscope.errors import CheckpointError, CorpusError, ResourceError
from qwenscope.files import disk_errors_named
from qwenscope.lm.tuned import choices
from qwenscope.parallel.agreement import Agreement, Decision
from qwenscope.parallel.group import RankLostError
from qwenscope.parallel.launch import joined, ranks, restarted
from qwenscope.recipe import Recipe
from qwenscope.training.building import check_activations
from qwenscope.training.closing import check_closing
from qwenscope.training.finish import publish
from qwenscope.training.folder import open_run
from qwenscope.training.saver import Saver
from qwenscope.training.session import Session, set_up
from qwenscope.training.signals import SignalWatch, Stopped
from qwenscope.training.telemetry import OnProgress, Progress, SAEProgress

logger = logging.getLogger(__name__)


def train(recipe: Recipe, out: Path, *, resume: bool = False, on_progress: OnProgress | None = None) -> None:
    """Train every SAE of `recipe` into the run folder `out`.

    SIGTERM, SIGINT and SIGHUP finish the step and save; SIGUSR1 saves and goes on (all in the main thread only). Under
    torchrun this is one rank of several: all call it alike, rank 0 keeps the folder and reports progress.

    Raises:
        Stopped: a signal ended the run; it carries the exit code.
        QwenscopeError: the run cannot start or go on; status.json says the same, and its last checkpoint stands.
    """
    check_activations(recipe)
    check_closing(recipe, ranks())
    with (
        joined(recipe.lm.device) as group,
        disk_errors_named(Path(out)),
        open_run(recipe, Path(out), resume or restarted(), group) as folder,
        SignalWatch(launched=group.size > 1) as watch,
    ):
        if group.broadcast_object(lambda: folder.is_complete(recipe)):
            logger.warning("%s is complete: every token was trained; nothing to do", folder.path)
            return
        on_progress = _while_it_lasts(on_progress) if on_progress is not None and group.leads else _unseen
        try:
            with disk_errors_named(folder.path), ExitStack() as closing:
                Run(set_up(recipe, folder, group, on_progress, closing), watch, on_progress).go()
        except Stopped:
            raise
        except BaseException as error:
            folder.write_failure(error, group)
            raise


class Run:
    """The loop of one session, or one rank's part of it: on to the end, a signal or an error.

    Whatever decides how it goes on is decided by all ranks, in the same order on each.
    """

    def __init__(self, session: Session, watch: SignalWatch, on_progress: OnProgress) -> None:
        self.session, self.watch, self.on_progress = session, watch, on_progress
        self.recipe, self.folder, self.group = session.recipe, session.folder, session.group
        self.step, self.target = session.step, self.folder.target
        self.saver = Saver(self.folder.checkpoints, self.recipe.checkpoint.keep, self.group.clone())
        self.saver.newest = session.resumed
        self.agreement = Agreement(self.group)
        self._saved_at = session.began
        self._clock: deque[tuple[float, int]] = deque(maxlen=20)  # (when, tokens) of the last looks
        self._progress = Progress("loading model", self.tokens, self.target)

    @property
    def tokens(self) -> int:
        """Trained so far."""
        return self.folder.tokens

    @property
    def _closing(self) -> bool:
        """Whether the next step takes place inside the model."""
        return self.session.closing_phase is not None and self.tokens >= self.recipe.training.shuffled_tokens

    def go(self) -> None:
        """Train to the target and publish. A save in flight is let through whatever ends the run."""
        try:
            if (stop := self._agree().stop) is not None:  # during a long load: nothing to save yet
                self._stopped(stop)
            self._clock.append((time.monotonic(), self.tokens))  # the first harvest is part of the rate
            if self.session.resumed is None:
                self._show("calibrating")
                self.session.suite.calibrate(self.session.windows.calibration_rows())
            self._steps()
            self._finish()
        except Stopped:
            raise
        except BaseException:
            try:
                if self.saver.ended(wait=True):
                    self._saved()
            except (ResourceError, CheckpointError, RankLostError) as second:
                logger.error("%s", second)
            raise

    # -- training -----------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        checkpoint = self.recipe.checkpoint
        decided = self._agree()
        while self.tokens < self.target:
            if decided.stop is not None:
                self._save_and_stop(decided.stop)
            before = self.tokens
            self._one_step()
            if self.step % self.recipe.telemetry.log_every_steps == 0 or self.tokens == self.target:
                self._log()
            if self.tokens == self.target:
                break  # the last save belongs to the ending
            snapshot = _crossed(before, self.tokens, checkpoint.snapshot_every_tokens)
            decided = self._agree()
            if snapshot or decided.save or _crossed(before, self.tokens, checkpoint.every_tokens):
                self._save_if_possible(snapshot)
            elif decided.saved:
                self._note_save()

    def _agree(self) -> Decision:
        """What all ranks do next for the sake of signals and clocks."""
        minutes = self.recipe.checkpoint.every_minutes
        due = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        own = Decision(self.watch.stop, self.watch.checkpoint or due, self.saver.idle)
        decided = self.agreement.after(self.step, own)
        if decided.save:
            self.watch.checkpoint = False
            self._saved_at = time.monotonic()
        return decided

    def _one_step(self) -> None:
        session, training = self.session, self.recipe.training
        if session.closing_phase is not None and self._closing:
            rows = session.closing_phase.step(self.target - self.tokens, self.step + 1)
        else:
            batch = session.windows.next_batch(min(training.batch_size, training.shuffled_tokens - self.tokens))
            if rows := session.windows.batch_rows:
                session.suite.step(batch, self.step + 1)
        if not rows:
            raise CorpusError(
                f"the corpus ended after {self.tokens:,} of training.tokens = {self.target:,}; add sources, or lower it"
            )
        self.step += 1
        self.folder.tokens += rows

    def _log(self) -> None:
        """One line of metrics: numbers of all SAEs, then guards, file, sinks and display."""
        saes = self.session.suite.numbers()
        now = time.monotonic()
        then, tokens_then = self._clock[0]
        speed = (self.tokens - tokens_then) / max(now - then, 1e-9)
        self._clock.append((now, self.tokens))
        if self.session.telemetry is not None:
            self.session.telemetry.log(
                {
                    "step": self.step,
                    "tokens": self.tokens,
                    "saes": saes,
                    "left_out": self.session.windows.left_out,
                    "seconds": round(self._seconds(), 3),
                    "tokens_per_second": round(speed, 1),
                }
            )
        self.session.guard.check({sae_id: values["fvu"] for sae_id, values in saes.items()}, self.step)
        self.folder.still_running()
        self._progress = Progress(
            "closing" if self._closing else "training",
            self.tokens,
            self.target,
            speed,
            (self.target - self.tokens) / speed if speed else None,
            {sae_id: SAEProgress(values["fvu"], values["dead"]) for sae_id, values in saes.items()},
        )
        self.on_progress(self._progress)

    def _save_and_stop(self, signum: int) -> NoReturn:
        if self.step:
            self._show("saving")
            self._save_and_wait()
        self._stopped(signum)

    def _stopped(self, signum: int) -> NoReturn:
        """Said at once: a harvest under way is still waited for, and who sent the signal may not."""
        self.folder.write_status("stopped")
        raise Stopped(signum, self.tokens)

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save(self, snapshot: bool = False) -> None:
        """Copy the state and go on; the writing of it happens behind. A save before this one is waited for."""
        self._note_save(wait=True)
        if self._saved_step() == self.step:
            return
        session = self.session
        self.group.all_gather_object(self._make_ready)
        state = {
            **session.facts,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self._seconds(),
            "windows": session.windows.state(),
            "guard": session.guard.state(),
            "rng": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode(),
            "threads": torch.get_num_threads(),
            "tuned_kernels": choices(),
        }
        self.saver.save(self.step, state, session.suite.state(), snapshot)
        self._saved_at = time.monotonic()

    def _make_ready(self) -> None:
        self.folder.check_there()
        self.session.suite.check_finite()
        if self.session.telemetry is not None:
            self.session.telemetry.file.flush()

    def _save_if_possible(self, snapshot: bool) -> None:
        try:
            self._save(snapshot)
        except ResourceError as error:
            self._go_on_despite(error)

    def _note_save(self, wait: bool = False) -> None:
        """Take note of a save that has ended; `wait` for one in flight."""
        try:
            if self.saver.ended(wait):
                self._saved()
        except ResourceError as error:
            self._go_on_despite(error)

    def _go_on_despite(self, error: ResourceError) -> None:
        """A full disk is survived as long as an older checkpoint stands: it may have room again before the end."""
        if self.saver.newest is None:
            raise error
        logger.error("%s", error)
        self.folder.note_now(str(error))
        self.folder.still_running()

    def _saved(self) -> None:
        assert self.saver.newest is not None
        self.folder.checkpoint = self.saver.newest.name
        self.folder.note_now(None)

    def _save_and_wait(self) -> None:
        """The last save of a session: it is on disk, or the error is raised."""
        self._save()
        if self.saver.ended(wait=True):
            self._saved()

    def _saved_step(self) -> int | None:
        return None if self.saver.newest is None else int(self.saver.newest.name.removeprefix("step-"))

    # -- ending -------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self._show("saving")
        if self._saved_step() != self.step:  # a session that only has the ending left to do has not read the corpus
            self.group.broadcast_object(lambda: self.folder.write("privacy_report.json", self.session.windows.report()))
        self._save_and_wait()
        self.group.broadcast_object(self.folder.check_there)
        points, widths = self.recipe.hook_points, self.session.widths
        needed = sum(4 * ((2 * width + 1) * points[sae_id].dict_size + width) for sae_id, width in widths.items())
        publish(self.session.suite.finished(), self.folder.path / "saes", needed, self.group)
        self.group.broadcast_object(lambda: self.folder.write_status("complete"))
        self._show("complete")

    def _show(self, phase: str) -> None:
        self._progress = replace(self._progress, phase=phase, tokens=self.tokens, target=self.target, eta_seconds=None)
        self.on_progress(self._progress)

    def _seconds(self) -> float:
        """Of this session and those before it."""
        return self.session.seconds + time.monotonic() - self.session.began


def _while_it_lasts(on_progress: OnProgress) -> OnProgress:
    """The display, until its terminal is gone: that must not cost the run."""

    def show(progress: Progress) -> None:
        nonlocal on_progress
        try:
            on_progress(progress)
        except OSError as error:
            on_progress = _unseen
            logger.error("progress is shown no longer (%s)", error.strerror)

    return show


def _unseen(progress: Progress) -> None:
    """Nobody watches."""


def _crossed(before: int, after: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return every is not None and before // every < after // every
