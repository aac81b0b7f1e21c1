"""The run folder: what stands in it, when it may be entered, and the honest state of the run.

recipe.yaml, run.json (where and with what), status.json (how far, and how it ended), metrics.jsonl,
privacy_report.json, checkpoints/, and saes/ once every token was trained. docs/checkpoints.md describes each.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from qwenscope.checksums import verify_folder
from qwenscope.errors import CheckpointError, FormatError, LockError, QwenscopeError, RecipeError, ResourceError
from qwenscope.files import (
    disk_errors_named,
    make_folder,
    read_json,
    read_object,
    remove_leftovers,
    write_json,
    write_text,
)
from qwenscope.machine import describe_machine
from qwenscope.parallel.group import ALONE, Group, RankLostError
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.training.checkpoint import remove_unfinished
from qwenscope.training.finish import UNPUBLISHED
from qwenscope.training.lock import LOCK_NAME, check_held, run_lock

logger = logging.getLogger(__name__)

# Keys that may differ between a checkpoint and the recipe it is resumed with: they touch no weight. (How an SAE is
# spread over ranks touches its last bits, and may change because their number may.)
_FREE_KEYS = (
    "checkpoint.",
    "telemetry.",
    "evaluation.",
    "corpus.workers",
    "activations.overlap",
    "training.latents_per_rank",
)
_LAST_WORDS = ".rank-{}.tmp"  # why a rank other than 0 ended; the next session removes it
_STATUS_SECONDS = 10.0  # between rewrites of an unchanged state


class RunFolder:
    """One run's folder, held by this process. Open it with `open_run`.

    Only rank 0 writes: on the others, what would change a file does nothing.
    """

    def __init__(self, path: Path, target: int, writes: bool = True) -> None:
        self.path, self.target, self._writes = path, target, writes
        self.note: str | None = None
        self.checkpoint: str | None = self.status.get("checkpoint")
        self.tokens = 0
        """Trained so far."""
        self.versions: dict[str, str] = {}
        self._written = -math.inf

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints stand."""
        return self.path / "checkpoints"

    @property
    def status(self) -> dict[str, Any]:
        """status.json as it stands, or an empty dict in a new folder."""
        path = self.path / "status.json"
        return read_object(path) if path.exists() else {}

    def check_there(self) -> None:
        """Refuse to go on where the folder, or the checkpoints in it, are no longer those of this run.

        Raises:
            CheckpointError: they were moved or deleted under way.
        """
        if not self._writes:
            return
        check_held(self.path)
        if self.checkpoint is not None and not (self.checkpoints / self.checkpoint).is_dir():
            raise CheckpointError(
                f"{self.checkpoints / self.checkpoint} was moved or deleted under way; bring it back and go on by "
                "--resume"
            )

    def is_complete(self, recipe: Recipe) -> bool:
        """Whether the run says that it is complete, and every SAE is there and verifies.

        Raises:
            OSError: the disk cannot be asked.
        """
        if self.status.get("state") != "complete":
            return False
        try:
            for sae_id in recipe.hook_points:
                verify_folder(self.path / "saes" / sae_id)
        except FormatError as error:
            logger.warning("%s is not complete though it says so (%s): ending it again", self.path, error)
            return False
        return True

    def write(self, name: str, value: Any) -> None:
        """Replace one of its JSON files.

        Raises:
            CheckpointError: the folder was moved or deleted under way.
            ResourceError: the operating system refuses.
        """
        check_held(self.path)
        write_json(self.path / name, value)

    def still_running(self) -> None:
        """Refresh a running status every few seconds (fsync is not free); a full disk makes it wait, not the run."""
        if time.monotonic() - self._written < _STATUS_SECONDS:
            return
        try:
            self.write_status("running")
        except ResourceError as error:
            self._written = time.monotonic()
            logger.error("%s", error)

    def write_status(self, state: str, error: str | None = None) -> None:
        """Replace status.json, as `write`."""
        if not self._writes:
            return
        self.write(
            "status.json",
            {
                "state": state,
                "tokens_trained": self.tokens,
                "tokens_target": self.target,
                "error": error,
                "note": self.note,
                "checkpoint": self.checkpoint,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "updated": _now(),
            },
        )
        self._written = time.monotonic()

    def write_failure(self, error: BaseException, group: Group) -> None:
        """status.json of a failed run, with the word that a lost rank left; whichever rank is left writes it.

        Without its recipe no run has begun, and a status alone would hold the folder against the next one.
        """
        lost = isinstance(error, RankLostError)
        try:
            if not (self.path / "recipe.yaml").exists():
                return
            if group.leads:
                words = [path.read_text(encoding="utf-8") for path in sorted(self.path.glob(_LAST_WORDS.format("*")))]
                self.write_status("failed", "; ".join([describe(error), *(words if lost else [])]))
            elif not lost:
                write_text(self.path / _LAST_WORDS.format(group.rank), f"rank {group.rank}: {describe(error)}")
            else:
                self._write_for_rank_0(describe(error))
        except (OSError, QwenscopeError) as second:
            logger.error("cannot write status.json: %s", second)

    def _write_for_rank_0(self, error: str) -> None:
        """Where rank 0 is gone its lock is free, a moment after its connections; where it lives, it writes itself."""
        for _ in range(40):
            if self.status.get("state") != "running":
                return
            with suppress(LockError), run_lock(self.path):
                self._writes = True
                self.write_status("failed", error)
                return
            time.sleep(0.05)

    def note_now(self, note: str | None) -> None:
        """Set or clear the note; the next refresh carries it without delay."""
        if note != self.note:
            self.note = note
            self._written = -math.inf

    def begin(self, recipe: Recipe, passed_over: Sequence[str], ranks: int) -> None:
        """Record the resolved recipe, this session's machine, versions and start in run.json, and that it runs."""
        if not self._writes:
            return
        write_text(self.path / "recipe.yaml", recipe.to_yaml())
        run = self.recorded() or {"sessions": []}
        machine = describe_machine(self.path)
        self.versions = machine["versions"]
        run.update(seed=recipe.seed, fingerprint=recipe.fingerprint(), commit=_commit(), machine=machine)
        run["sessions"].append(
            {
                "started": _now(),
                "from": self.checkpoint,
                "passed_over": list(passed_over),
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "threads": torch.get_num_threads(),
                "ranks": ranks,
            }
        )
        self.write("run.json", run)
        self.write_status("running")

    def record(self, **facts: Any) -> None:
        """Add top-level facts (revisions, precision ...) to run.json."""
        if self._writes:
            self.write("run.json", {**self.recorded(), **facts})

    def recorded(self) -> dict[str, Any]:
        """run.json as it stands, or an empty dict in a new folder."""
        path = self.path / "run.json"
        return read_object(path) if path.exists() else {}


@contextmanager
def open_run(recipe: Recipe, out: Path, resume: bool, group: Group = ALONE) -> Iterator[RunFolder]:
    """Hold `out` for this process (of several ranks, for rank 0), after checking that the run may start or go on there.

    Raises:
        RecipeError: `out` holds something else, or a run that has begun, while `resume` is off or of another recipe.
            Or the ranks were started with unlike recipes.
        LockError: another process works in it.
        ResourceError: it cannot be written; or a rank sees another folder under this name.
    """
    if len(set(group.all_gather_object(recipe.fingerprint))) > 1:
        raise RecipeError("the ranks were started with unlike recipes; give all machines the same file and --set")
    with ExitStack() as held:
        with disk_errors_named(out):
            holder = group.broadcast_object(lambda: _enter(recipe, out, resume, held))
            group.all_gather_object(lambda: _check_shared(out, holder))
            folder = RunFolder(out, recipe.training.tokens, group.leads)
        yield folder


def _enter(recipe: Recipe, out: Path, resume: bool, held: ExitStack) -> Any:
    """Lock the folder into `held` -> what the lock file says."""
    present = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    if present and "recipe.yaml" not in present:
        raise RecipeError(f"{out} is not empty and holds no run; choose a new folder")
    make_folder(out)
    held.enter_context(run_lock(out))
    _remove_leftovers(out)
    _forget_false_start(out)
    if (out / "recipe.yaml").exists():
        if not resume:
            raise RecipeError(f"{out} already holds a run; go on with it by --resume, or choose a new folder")
        check_same_recipe(load_recipe(out / "recipe.yaml").model_dump(mode="json"), recipe, out / "recipe.yaml")
    return read_json(out / LOCK_NAME)


def _forget_false_start(out: Path) -> None:
    """A run that failed before its first step leaves nothing to go on with, and does not hold its folder."""
    status = dict(read_json(out / "status.json")) if (out / "status.json").exists() else {}
    trained = status.get("tokens_trained") or status.get("checkpoint") or list(out.glob("checkpoints/*"))
    if status.get("state") == "failed" and not trained:
        logger.warning("%s failed before its first step (%s): starting anew", out, status.get("error"))
        for name in ("run.json", "metrics.jsonl", "privacy_report.json", "status.json", "recipe.yaml"):
            (out / name).unlink(missing_ok=True)


def _check_shared(out: Path, holder: Any) -> None:
    path = out / LOCK_NAME
    if not path.exists() or read_json(path) != holder:
        raise ResourceError(f"{out} is another folder here than on rank 0; put --out where all machines see the same")


def check_same_recipe(saved: Mapping[str, Any], recipe: Recipe, where: Path) -> None:
    """Refuse to go on with a recipe that would train other weights; keys that `saved` is too old to have are defaults.

    Raises:
        RecipeError: names every differing key with both values; or `saved` is of a version that has other keys.
    """
    try:
        known = Recipe.model_validate(saved).model_dump(mode="json")
    except ValidationError as error:
        raise RecipeError(
            f"{where} holds a recipe that this version does not read ({error.errors()[0]['msg']}: "
            f"{'.'.join(map(str, error.errors()[0]['loc']))}); resume with the version that wrote it"
        ) from None
    before, now = dict(_flatten(known)), dict(_flatten(recipe.model_dump(mode="json")))
    keys = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    differing = [key for key in keys if not key.startswith(_FREE_KEYS)]
    if differing:
        named = "; ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differing)
        raise RecipeError(f"{where} is of another recipe ({named}); resume with the same one, or choose a new --out")


def check_checkpoint_expected(folder: RunFolder) -> None:
    """Refuse to start over where the status says that a checkpoint was saved.

    Raises:
        CheckpointError: the checkpoints have been taken away.
    """
    if name := folder.status.get("checkpoint"):
        raise CheckpointError(
            f"{folder.checkpoints} holds no checkpoint, but status.json knows of {name}; bring it back, or start over "
            "in a new --out"
        )


def describe(error: BaseException) -> str:
    """One line for status.json: the message of a user's error, type and message of any other."""
    text = " ".join(str(error).split())
    return text if isinstance(error, QwenscopeError) else f"{type(error).__name__}: {text}"


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}{key}.")
    elif isinstance(tree, list | tuple):
        yield from _flatten(dict(enumerate(tree)), prefix)
    else:
        yield prefix.removesuffix("."), tree


def _remove_leftovers(out: Path) -> None:
    """What killed sessions left, and killed commands that wrote beside them (we hold the lock: nobody else trains)."""
    remove_leftovers(out)
    remove_unfinished(out / "checkpoints")
    shutil.rmtree(out / UNPUBLISHED, ignore_errors=True)
    for path in out.glob(_LAST_WORDS.format("*")):
        path.unlink()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """The git commit of an editable installation, or None."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
