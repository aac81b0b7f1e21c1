"""Drive the walk: conversations -> windows -> one step of every SAE, saved, watched, resumed, and honestly ended.

`qwenscope train RECIPE --out RUN` is `train(load_recipe(RECIPE), RUN)`. docs/checkpoints.md says what is promised.
"""

from __future__ import annotations

import base64
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from qwenscope.activations.windows import Windows
from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import CheckpointError, CorpusError, ModelError, ResourceError
from qwenscope.files import write_json
from qwenscope.lm.load import check_hook_points, layer_kinds, load_config
from qwenscope.lm.sites import sites_of
from qwenscope.ranks import Group, RankLostError
from qwenscope.recipe import LMRecipe, Recipe
from qwenscope.seeds import derive_seed
from qwenscope.training.admission import open_source
from qwenscope.training.checkpoint import Checkpoint, load_newest, set_aside_newer
from qwenscope.training.finish import publish
from qwenscope.training.folder import RunFolder, check_checkpoint_expected, check_same_recipe, open_run
from qwenscope.training.guards import LossGuard
from qwenscope.training.parallel import Pulse, Wishes, divide, joined, restarted
from qwenscope.training.probe import check_probe, check_ranks, probe
from qwenscope.training.saver import Saver
from qwenscope.training.signals import SignalWatch, Stopped
from qwenscope.training.suite import Suite, wanted
from qwenscope.training.telemetry import Progress, SAEProgress, Telemetry

log = logging.getLogger(__name__)

T = TypeVar("T")
OnProgress = Callable[[Progress], None]


def train(recipe: Recipe, out: Path, *, resume: bool = False, on_progress: OnProgress | None = None) -> None:
    """Train every SAE of `recipe` into the run folder `out`.

    SIGTERM and SIGINT finish the step and save; SIGUSR1 saves and goes on (all in the main thread only). Under torchrun
    this is one rank of several: all call it alike, rank 0 keeps the folder and reports progress.

    Raises:
        Stopped: a signal ended the run; it carries the exit code.
        QwenscopeError: the run cannot start or go on; status.json says the same, and its last checkpoint stands.
    """
    with (
        joined(recipe.lm.device) as group,
        open_run(recipe, Path(out), resume or restarted(), group) as folder,
        SignalWatch(launched=group.size > 1) as watch,
    ):
        if group.share(lambda: folder.status.get("state")) == "complete":
            log.warning("%s is complete: every token was trained; nothing to do", folder.path)
            return
        shown = on_progress if group.leads else None
        run = Run(recipe, folder, watch, shown or (lambda progress: None), group)
        try:
            run.go()
        except BaseException as error:
            if not isinstance(error, Stopped):
                run.fail(error)
            raise


class Run:
    """One session of a run, or one rank's part of it: from the start or a checkpoint to the end, a signal or an error.

    Whatever decides how it goes on is decided by `group`, in the same order on every rank.
    """

    def __init__(
        self, recipe: Recipe, folder: RunFolder, watch: SignalWatch, on_progress: OnProgress, group: Group
    ) -> None:
        self.recipe, self.folder, self.watch, self.on_progress = recipe, folder, watch, on_progress
        self.group = group
        self.step = 0
        self.tokens = 0
        self.target = recipe.training.tokens
        self.seconds = 0.0  # of earlier sessions
        self.guard = LossGuard()
        self.saver = Saver(folder.checkpoints, recipe.checkpoint.keep, group.twin())
        self.pulse = Pulse(group)
        self.telemetry: Telemetry | None = None  # rank 0's
        self.stream: CorpusStream | None = None  # rank 0's
        self._began = self._saved_at = time.monotonic()
        self._progress = Progress("loading model", 0, self.target)

    def go(self) -> None:
        """Set up, train to the target, publish."""
        with ExitStack() as closing:
            saved = self._find_checkpoint()
            self.group.share(lambda: self._begin(closing))
            self._load(saved, closing)
            self._calibrate_or_restore(saved)
            del saved  # as large as the SAEs with their moments
            self._steps()
            self._finish()

    def fail(self, error: BaseException) -> None:
        """Record how the run ended; the caller re-raises. A save in flight is let through first."""
        try:
            if self.saver.ended(wait=True):
                self._saved()
        except (ResourceError, CheckpointError, RankLostError) as second:
            log.error("%s", second)
        try:
            self.folder.write_failure(self.tokens, error, self.group)
        except (OSError, ResourceError) as second:
            log.error("cannot write status.json: %s", second)

    # -- setting up ---------------------------------------------------------------------------------------------------

    def _find_checkpoint(self) -> Checkpoint | None:
        mine = wanted(self.recipe, self.group)
        saved, self.passed_over = load_newest(self.folder.checkpoints, mine, self.group)
        for reason in self.passed_over:
            log.warning("passed over a checkpoint: %s", reason)
        if saved is None:
            self.group.share(lambda: check_checkpoint_expected(self.folder))
            if self.folder.status:
                log.warning("%s holds no checkpoint yet: starting from the first token", self.folder.path)
        else:
            self.saver.newest = newest = saved.path
            check_same_recipe(saved.state["recipe"], self.recipe, newest)
            self.group.share(lambda: set_aside_newer(self.folder.checkpoints, newest))
            self.folder.checkpoint = newest.name
            self.step, self.tokens, self.seconds = saved.state["step"], saved.state["tokens"], saved.state["seconds"]
            log.info("going on from %s: %s of %s tokens", saved.path, f"{self.tokens:,}", f"{self.target:,}")
        return saved

    def _begin(self, closing: ExitStack) -> None:
        """Record the session in the folder and open its metrics."""
        if self.passed_over:
            self.folder.note_now(f"went on from {self.folder.checkpoint}; passed over: {'; '.join(self.passed_over)}")
        self.folder.begin(self.recipe, self.passed_over, self.group.size)
        self.folder.write_status("running", self.tokens)
        config = self.recipe.model_dump(mode="json")
        self.telemetry = Telemetry(self.folder.path, self.recipe.telemetry.sinks, config, self.step)
        closing.callback(self.telemetry.close)

    def _load(self, saved: Checkpoint | None, closing: ExitStack) -> None:
        recipe = self.recipe
        self._show("loading model")
        torch.manual_seed(derive_seed(recipe.seed, "run"))  # nothing should draw from it; if something does, it repeats
        # What was resolved once stays: revisions of model and data, and the precision that "auto" measured.
        earlier = self.group.share(lambda: _resolved(saved.state if saved else self.folder.recorded()))
        revisions, precision = earlier.get("revisions"), earlier.get("precision") or {}
        pinned = recipe.lm.model_copy(update={"revision": revisions["model"]}) if revisions else recipe.lm
        models = self.group.together(lambda: self._load_model(pinned, revisions, closing))
        if len(set(models)) > 1:
            raise ModelError(f"ranks loaded unlike revisions of {recipe.lm.model} ({models}); set lm.revision")
        corpus = self.group.share(lambda: self._open_corpus(revisions["corpus"] if revisions else None, closing))
        self.windows = Windows(self.lm, self.stream, recipe, divide(recipe, self.lm, self.group))
        closing.callback(self.windows.close)
        self.suite = Suite(recipe, self.lm, self.group, precision)
        self.precision = self._of_all(lambda: self.suite.precision)
        self.revisions = {"model": self.lm.revision, "corpus": corpus}
        self.probe = probe(self.lm, sites_of(recipe))
        self._note(check_ranks(self.group.together(lambda: self.probe)))
        self.group.share(
            lambda: self.folder.record(revisions=self.revisions, precision=self.precision, parity=self.parity)
        )

    def _note(self, difference: str | None) -> None:
        if difference is not None:
            log.warning("%s", difference)
            self.folder.note_now(difference)

    def _load_model(self, lm: LMRecipe, revisions: dict[str, Any] | None, closing: ExitStack) -> str | None:
        check_hook_points(layer_kinds(load_config(lm)), self.recipe.hook_points)  # before minutes of loading
        corpus = revisions["corpus"] if revisions else None
        self.lm, self.parity = open_source(lm, self.recipe, corpus, self.group.size, closing)
        return self.lm.revision

    def _open_corpus(self, revisions: dict[str, str] | None, closing: ExitStack) -> dict[str, str]:
        corpus, seed = self.recipe.corpus, self.recipe.seed
        self.stream = CorpusStream(corpus, self.lm.tokenizer, seed=seed, revisions=revisions, workers=corpus.workers)
        closing.callback(self.stream.close)
        return dict(self.stream.revisions)

    def _of_all(self, act: Callable[[], dict[str, T]]) -> dict[str, T]:
        """What `act` says of each rank's own SAEs, for all of them, in the recipe's order."""
        merged = {sae_id: value for part in self.group.together(act) for sae_id, value in part.items()}
        return {sae_id: merged[sae_id] for sae_id in self.recipe.hook_points}

    def _calibrate_or_restore(self, saved: Checkpoint | None) -> None:
        if (wishes := self._agree()).stop is not None:  # during a long load: nothing to save yet
            self._stopped(wishes.stop)
        if saved is None:
            self._show("calibrating")
            self.suite.calibrate(self.windows.calibration_rows())
            return
        self._show("resuming")
        state = saved.state
        self._note(self.group.together(lambda: check_probe(state["probe"], self.probe))[0])
        if state["threads"] != torch.get_num_threads():
            log.warning(
                "saved with %d threads, going on with %d: not to the same bits (OMP_NUM_THREADS sets it)",
                state["threads"],
                torch.get_num_threads(),
            )
        self.group.together(lambda: self.suite.load(saved.tensors))
        self.windows.restore(state["windows"])
        self.guard.restore(state["guard"])
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["rng"])), dtype=torch.uint8))

    # -- training -----------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        training, checkpoint = self.recipe.training, self.recipe.checkpoint
        self._clock = deque([(time.monotonic(), self.tokens)], maxlen=20)
        wishes = self._agree()
        while self.tokens < self.target:
            if wishes.stop is not None:
                self._stop(wishes.stop)
            before = self.tokens
            self._one_step(min(training.batch_size, self.target - self.tokens))
            if self.step % self.recipe.telemetry.log_every_steps == 0 or self.tokens == self.target:
                self._log()
            if self.tokens == self.target:
                break  # the last save belongs to the ending
            snapshot = _crossed(before, self.tokens, checkpoint.snapshot_every_tokens)
            wishes = self._agree()
            if snapshot or wishes.save or _crossed(before, self.tokens, checkpoint.every_tokens):
                self._save_if_possible(snapshot)
            elif wishes.saved:
                self._look_at_save()

    def _agree(self) -> Wishes:
        """What all ranks do next for the sake of signals and clocks."""
        minutes = self.recipe.checkpoint.every_minutes
        due = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        own = Wishes(self.watch.stop, self.watch.checkpoint or due, self.saver.idle)
        wishes = self.pulse.beat(self.step, own)
        if wishes.save:
            self.watch.checkpoint = False
            self._saved_at = time.monotonic()
        return wishes

    def _one_step(self, size: int) -> None:
        batch = self.windows.next_batch(size)
        rows = self.windows.batch_rows
        if not rows:
            raise CorpusError(
                f"the corpus ended after {self.tokens:,} of training.tokens = {self.target:,}; add sources, or lower it"
            )
        self.suite.step(batch, self.step + 1)
        self.step += 1
        self.tokens += rows

    def _log(self) -> None:
        """One line of metrics: numbers of all SAEs, then guards, file, sinks and display."""
        saes = self._of_all(self.suite.numbers)
        now = time.monotonic()
        then, tokens_then = self._clock[0]
        speed = (self.tokens - tokens_then) / max(now - then, 1e-9)
        self._clock.append((now, self.tokens))
        if self.telemetry is not None:
            self.telemetry.log(
                {
                    "step": self.step,
                    "tokens": self.tokens,
                    "saes": saes,
                    "left_out": self.windows.left_out,
                    "seconds": round(self._seconds(), 3),
                    "tokens_per_second": round(speed, 1),
                }
            )
        self.guard.check({sae_id: values["fvu"] for sae_id, values in saes.items()}, self.step)
        self.folder.still_running(self.tokens)
        shown = {sae_id: SAEProgress(values["fvu"], values["dead"]) for sae_id, values in saes.items()}
        self._progress = Progress(
            "training", self.tokens, self.target, speed, (self.target - self.tokens) / speed if speed else None, shown
        )
        self.on_progress(self._progress)

    def _stop(self, signum: int) -> NoReturn:
        if self.step:
            self._show("saving")
            self._save_and_wait()
        self._stopped(signum)

    def _stopped(self, signum: int) -> NoReturn:
        """Said at once: a harvest under way is still waited for, and who sent the signal may not."""
        self.folder.write_status("stopped", self.tokens)
        raise Stopped(signum, self.tokens)

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save(self, snapshot: bool = False) -> None:
        """Copy the state and go on; the writing of it happens behind. A save before this one is waited for."""
        self._look_at_save(wait=True)
        if self._saved_step() == self.step:
            return
        self.group.together(self._make_ready)
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self._seconds(),
            "windows": self.windows.state(),
            "guard": self.guard.state(),
            "rng": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode(),
            "probe": self.probe,
            "recipe": self.recipe.model_dump(mode="json"),
            "revisions": self.revisions,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "versions": self.folder.versions,
        }
        self.saver.save(self.step, state, self.suite.state(), snapshot)
        self._saved_at = time.monotonic()

    def _make_ready(self) -> None:
        self.suite.check_finite()
        if self.telemetry is not None:
            self.telemetry.file.flush()

    def _save_if_possible(self, snapshot: bool) -> None:
        try:
            self._save(snapshot)
        except ResourceError as error:
            self._go_on_despite(error)

    def _look_at_save(self, wait: bool = False) -> None:
        """Take note of a save that has ended."""
        try:
            if self.saver.ended(wait):
                self._saved()
        except ResourceError as error:
            self._go_on_despite(error)

    def _go_on_despite(self, error: ResourceError) -> None:
        """A full disk is survived as long as an older checkpoint stands: it may have room again before the end."""
        if self.saver.newest is None:
            raise error
        log.error("%s", error)
        self.folder.note_now(str(error))
        self.folder.still_running(self.tokens)

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
            self.group.share(lambda: write_json(self.folder.path / "privacy_report.json", self.windows.report()))
        self._save_and_wait()
        hidden = self.lm.hidden_dim
        needed = sum(
            4 * (2 * hidden * point.dict_size + point.dict_size + hidden) for point in self.recipe.hook_points.values()
        )
        publish(self.suite.finished(), self.folder.path / "saes", needed, self.group)
        self.group.share(lambda: self.folder.write_status("complete", self.tokens))
        self._show("complete")

    def _show(self, phase: str) -> None:
        before = self._progress
        self._progress = Progress(phase, self.tokens, self.target, before.tokens_per_second, None, before.saes)
        self.on_progress(self._progress)

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self._began


def _resolved(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a state or run.json says of choices that are made once."""
    return {name: record.get(name) for name in ("revisions", "precision")}


def _crossed(before: int, after: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return every is not None and before // every < after // every
