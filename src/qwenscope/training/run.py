"""Drive the walk: conversations -> windows -> one step of every SAE, saved, watched, resumed, and honestly ended.

`qwenscope train RECIPE --out RUN` is `train(load_recipe(RECIPE), RUN)`. docs/checkpoints.md says what is promised.
"""

from __future__ import annotations

import base64
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor

from qwenscope.activations.windows import Windows
from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import CheckpointError, CorpusError, ResourceError, TrainingError
from qwenscope.files import write_json
from qwenscope.lm.load import check_hook_points, layer_kinds, load_config, load_language_model
from qwenscope.recipe import Recipe
from qwenscope.sae.selection import Precision
from qwenscope.sae.topk import TopKSAE
from qwenscope.seeds import derive_seed
from qwenscope.training.checkpoint import Checkpoint, list_checkpoints, load_newest, set_aside_newer
from qwenscope.training.finish import publish
from qwenscope.training.folder import RunFolder, check_checkpoint_expected, check_same_recipe, describe, open_run
from qwenscope.training.guards import LossGuard
from qwenscope.training.probe import check_probe, probe
from qwenscope.training.saver import Saver
from qwenscope.training.signals import SignalWatch, Stopped
from qwenscope.training.telemetry import Progress, SAEProgress, Telemetry
from qwenscope.training.trainer import SAETrainer, StepMetrics

log = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]
_NUMBERS = ("fvu", "loss", "aux_loss", "l0", "dead", "grad_norm")  # of StepMetrics, in metrics.jsonl under these names


def train(recipe: Recipe, out: Path, *, resume: bool = False, on_progress: OnProgress | None = None) -> None:
    """Train every SAE of `recipe` into the run folder `out`.

    SIGTERM and SIGINT finish the step and save; SIGUSR1 saves and goes on (all in the main thread only).

    Raises:
        Stopped: a signal ended the run; it carries the exit code.
        QwenscopeError: the run cannot start or go on; status.json says the same, and its last checkpoint stands.
    """
    with open_run(recipe, Path(out), resume) as folder, SignalWatch() as watch:
        if folder.status.get("state") == "complete":
            log.warning("%s is complete: every token was trained; nothing to do", folder.path)
            return
        run = Run(recipe, folder, watch, on_progress or (lambda progress: None))
        try:
            run.go()
        except Stopped:
            folder.write_status("stopped", run.tokens)
            raise
        except BaseException as error:
            run.fail(error)
            raise


class Run:
    """One session of a run: from the start or a checkpoint to the end, a signal or an error."""

    def __init__(self, recipe: Recipe, folder: RunFolder, watch: SignalWatch, on_progress: OnProgress) -> None:
        self.recipe, self.folder, self.watch, self.on_progress = recipe, folder, watch, on_progress
        self.step = 0
        self.tokens = 0
        self.target = recipe.training.tokens
        self.seconds = 0.0  # of earlier sessions
        self.guard = LossGuard()
        self.saver = Saver(folder.checkpoints, recipe.checkpoint.keep)
        self._began = self._saved_at = time.monotonic()
        self._finite: list[tuple[int, str, Tensor]] = []  # flags of steps not looked at yet
        self._progress = Progress("loading model", 0, self.target)

    def go(self) -> None:
        """Set up, train to the target, publish."""
        with ExitStack() as closing:
            saved = self._find_checkpoint()
            config = self.recipe.model_dump(mode="json")
            self.telemetry = Telemetry(self.folder.path, self.recipe.telemetry.sinks, config, self.step)
            closing.callback(self.telemetry.close)
            self._load(saved)
            closing.callback(self.stream.close)
            self._calibrate_or_restore(saved)
            self._steps()
            self._finish()

    def fail(self, error: BaseException) -> None:
        """Record how the run ended; the caller re-raises. A save in flight is let through first."""
        try:
            if self.saver.ended(wait=True):
                self._saved()
        except (ResourceError, CheckpointError) as second:
            log.error("%s", second)
        try:
            self.folder.write_status("failed", self.tokens, describe(error))
        except (OSError, ResourceError) as second:
            log.error("cannot write status.json: %s", second)

    # -- setting up ---------------------------------------------------------------------------------------------------

    def _find_checkpoint(self) -> Checkpoint | None:
        saved, passed_over = load_newest(self.folder.checkpoints)
        for reason in passed_over:
            log.warning("passed over a checkpoint: %s", reason)
        if saved is None:
            check_checkpoint_expected(self.folder)
            if self.folder.status:
                log.warning("%s holds no checkpoint yet: starting from the first token", self.folder.path)
        else:
            check_same_recipe(saved.state["recipe"], self.recipe, saved.path)
            set_aside_newer(self.folder.checkpoints, saved.path)
            self.folder.checkpoint = saved.path.name
            self.step, self.tokens, self.seconds = saved.state["step"], saved.state["tokens"], saved.state["seconds"]
            log.info("going on from %s: %s of %s tokens", saved.path, f"{self.tokens:,}", f"{self.target:,}")
        if passed_over:
            self.folder.note_now(f"went on from {self.folder.checkpoint}; passed over: {'; '.join(passed_over)}")
        self.folder.begin(self.recipe, passed_over)
        self.folder.write_status("running", self.tokens)
        return saved

    def _load(self, saved: Checkpoint | None) -> None:
        recipe = self.recipe
        self._show("loading model")
        torch.manual_seed(derive_seed(recipe.seed, "run"))  # nothing should draw from it; if something does, it repeats
        # What was resolved once stays: revisions of model and data, and the precision that "auto" measured.
        earlier = saved.state if saved else self.folder.recorded()
        revisions, precision = earlier.get("revisions"), earlier.get("precision", {})
        pinned = recipe.lm.model_copy(update={"revision": revisions["model"]}) if revisions else recipe.lm
        check_hook_points(layer_kinds(load_config(pinned)), recipe.hook_points)  # before minutes of loading
        self.lm = load_language_model(pinned, last_layer=max(recipe.layers))
        self.stream = CorpusStream(
            recipe.corpus,
            self.lm.tokenizer,
            seed=recipe.seed,
            revisions=revisions["corpus"] if revisions else None,
            workers=recipe.corpus.workers,
        )
        self.windows = Windows(self.lm, self.stream, recipe)
        self.trainers = {
            sae_id: self._trainer(sae_id, precision.get(sae_id, recipe.training.precision))
            for sae_id in recipe.hook_points
        }
        self.precision = {sae_id: trainer.precision for sae_id, trainer in self.trainers.items()}
        self.revisions = {"model": self.lm.revision, "corpus": dict(self.stream.revisions)}
        self.probe = probe(self.lm, recipe.layers)
        self.folder.record(revisions=self.revisions, precision=self.precision)

    def _trainer(self, sae_id: str, precision: Precision | Literal["auto"]) -> SAETrainer:
        point, training = self.recipe.hook_points[sae_id], self.recipe.training
        seed = derive_seed(self.recipe.seed, "sae", sae_id)
        sae = TopKSAE(self.lm.hidden_dim, point.dict_size, point.k, seed=seed).to(self.lm.device)
        sae.config |= {
            "sae_id": sae_id,
            "layer": point.layer,
            "kind": self.lm.layer_kinds[point.layer],
            "model": self.lm.name,
            "model_revision": self.lm.revision,
            "tokens": training.tokens,
        }
        return SAETrainer(
            sae,
            point.lr,
            tokens=training.tokens,
            warmup_tokens=training.warmup_steps * training.batch_size,
            decay_share=training.decay_share,
            aux_coefficient=training.aux_coefficient,
            aux_k=training.aux_k,
            dead_after_tokens=training.dead_after_tokens,
            resample_every_steps=training.resample_every_steps,
            normalise=training.normalise,
            precision=precision,
            betas=training.betas,
            eps=training.eps,
            clip_norm=training.clip_norm,
            moments=getattr(torch, training.moments),
            seed=derive_seed(self.recipe.seed, "resampling", sae_id),
        )

    def _calibrate_or_restore(self, saved: Checkpoint | None) -> None:
        if self.watch.stop is not None:  # during a long load: nothing to save yet
            raise Stopped(self.watch.stop, self.tokens)
        if saved is None:
            self._show("calibrating")
            rows = self.windows.calibration_rows()
            for sae_id, trainer in self.trainers.items():
                trainer.calibrate(rows[self.recipe.hook_points[sae_id].layer])
            return
        self._show("resuming")
        state = saved.state
        if (difference := check_probe(state["probe"], self.probe)) is not None:
            log.warning("%s", difference)
            self.folder.note_now(difference)
        if state["threads"] != torch.get_num_threads():
            log.warning(
                "saved with %d threads, going on with %d: not to the same bits (OMP_NUM_THREADS sets it)",
                state["threads"],
                torch.get_num_threads(),
            )
        for sae_id, trainer in self.trainers.items():
            trainer.load_state_dict(saved.tensors[sae_id])
        self.windows.restore(state["windows"])
        self.guard.restore(state["guard"])
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["rng"])), dtype=torch.uint8))

    # -- training -----------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        training, checkpoint = self.recipe.training, self.recipe.checkpoint
        self._clock = deque([(time.monotonic(), self.tokens)], maxlen=20)
        while self.tokens < self.target:
            if self.watch.stop is not None:
                self._stop(self.watch.stop)
            before = self.tokens
            self._one_step(min(training.batch_size, self.target - self.tokens))
            if self.step % self.recipe.telemetry.log_every_steps == 0 or self.tokens == self.target:
                self._log()
            if self.tokens == self.target:
                break  # the last save belongs to the ending
            snapshot = _crossed(before, self.tokens, checkpoint.snapshot_every_tokens)
            if (
                snapshot
                or self.watch.checkpoint
                or _crossed(before, self.tokens, checkpoint.every_tokens)
                or (checkpoint.every_minutes and time.monotonic() - self._saved_at > 60 * checkpoint.every_minutes)
            ):
                self.watch.checkpoint = False
                self._save_if_possible(snapshot)
            self._look_at_save()

    def _one_step(self, size: int) -> None:
        batch = self.windows.next_batch(size)
        rows = len(next(iter(batch.values())))
        if not rows:
            raise CorpusError(
                f"the corpus ended after {self.tokens:,} of training.tokens = {self.target:,}; add sources, or lower it"
            )
        self._last: dict[str, StepMetrics] = {}
        for sae_id, trainer in self.trainers.items():
            metrics = trainer.step(batch[self.recipe.hook_points[sae_id].layer])
            self._last[sae_id] = metrics
            self._finite.append((self.step + 1, sae_id, metrics.finite))
        self.step += 1
        self.tokens += rows

    def _check_finite(self) -> None:
        """Look at the flags of all steps since the last look: one transfer. The trainer has skipped a bad update."""
        if not self._finite:
            return
        flags = torch.stack([finite for _, _, finite in self._finite]).tolist()
        for (step, sae_id, _), finite in zip(self._finite, flags, strict=True):
            if not finite:
                raise TrainingError(
                    f"{sae_id}: loss or gradient is not finite at step {step}; the last checkpoint is good: "
                    f"lower hook_points.{sae_id}.lr, or look for extreme rows at its layer"
                )
        self._finite.clear()

    def _log(self) -> None:
        """One line of metrics: one transfer for all SAEs, then guards, file, sinks and display."""
        self._check_finite()
        numbers = torch.stack([getattr(m, name).float() for m in self._last.values() for name in _NUMBERS]).tolist()
        saes: dict[str, dict[str, float]] = {}
        for position, (sae_id, metrics) in enumerate(self._last.items()):
            values = numbers[position * len(_NUMBERS) : (position + 1) * len(_NUMBERS)]
            saes[sae_id] = dict(zip(_NUMBERS, values, strict=True))
            saes[sae_id]["dead"] /= self.recipe.hook_points[sae_id].dict_size
            saes[sae_id]["lr"] = metrics.lr
        now = time.monotonic()
        then, tokens_then = self._clock[0]
        speed = (self.tokens - tokens_then) / max(now - then, 1e-9)
        self._clock.append((now, self.tokens))
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
        raise Stopped(signum, self.tokens)

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save(self, snapshot: bool = False) -> None:
        """Copy the state and go on; the writing of it happens behind. A save before this one is waited for."""
        self._look_at_save(wait=True)
        if self._newest() == self.step:
            return
        self._check_finite()
        self.telemetry.file.flush()
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
        tensors = {sae_id: trainer.state_dict() for sae_id, trainer in self.trainers.items()}
        self.saver.save(self.step, state, tensors, snapshot)
        self._saved_at = time.monotonic()

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
        if self._newest() is None:
            raise error
        log.error("%s", error)
        self.folder.note_now(str(error))
        self.folder.still_running(self.tokens)

    def _saved(self) -> None:
        self.folder.checkpoint = list_checkpoints(self.folder.checkpoints)[-1].name
        self.folder.note_now(None)

    def _save_and_wait(self) -> None:
        """The last save of a session: it is on disk, or the error is raised."""
        self._save()
        if self.saver.ended(wait=True):
            self._saved()

    def _newest(self) -> int | None:
        found = list_checkpoints(self.folder.checkpoints)
        return int(found[-1].name.removeprefix("step-")) if found else None

    # -- ending -------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self._show("saving")
        if self._newest() != self.step:  # a session that only has the ending left to do has not read the corpus
            write_json(self.folder.path / "privacy_report.json", self.windows.report())
        self._save_and_wait()
        publish({sae_id: trainer.sae() for sae_id, trainer in self.trainers.items()}, self.folder.path / "saes")
        self.folder.write_status("complete", self.tokens)
        self._show("complete")

    def _show(self, phase: str) -> None:
        before = self._progress
        self._progress = Progress(phase, self.tokens, self.target, before.tokens_per_second, None, before.saes)
        self.on_progress(self._progress)

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self._began


def _crossed(before: int, after: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return every is not None and before // every < after // every
