"""Set a run up: the checkpoint it goes on from, the language model, the corpus, the trainers -> `Session`.

Whatever is opened here is closed by the caller's ExitStack. All ranks make the same calls in the same order; rank 0
alone has the corpus and the metrics.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from qwenscope.activations.windows import Windows
from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import ModelError
from qwenscope.lm.load import check_hook_points, layer_kinds, load_config
from qwenscope.lm.model import LanguageModel, RowSource
from qwenscope.lm.sites import hooked_sites, sites_of
from qwenscope.lm.tuned import Choices, choices, choose
from qwenscope.parallel.group import Group
from qwenscope.recipe import Recipe
from qwenscope.seeds import derive_seed
from qwenscope.training.admission import open_source
from qwenscope.training.building import plan_harvest
from qwenscope.training.checkpoint import Checkpoint, load_newest, set_aside_newer
from qwenscope.training.closing import ClosingPhase
from qwenscope.training.folder import RunFolder, check_checkpoint_expected, check_same_recipe
from qwenscope.training.guards import LossGuard
from qwenscope.training.probe import check_probe, check_ranks, probe, warm_up
from qwenscope.training.suite import Suite, wanted
from qwenscope.training.telemetry import OnProgress, Progress, Telemetry

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """All that the loop needs, from the first step or from a checkpoint on."""

    recipe: Recipe
    folder: RunFolder
    group: Group
    widths: dict[str, int]
    windows: Windows
    suite: Suite
    closing_phase: ClosingPhase | None
    """Of a run with `training.kl_share`."""
    guard: LossGuard
    telemetry: Telemetry | None
    """Rank 0's."""
    facts: Mapping[str, Any]
    """What every checkpoint of this session says alike: probe, recipe, revisions, precision, versions."""
    resumed: Path | None
    """The checkpoint that it goes on from."""
    step: int
    """Steps, and seconds, of the sessions before."""
    seconds: float
    began: float
    """On the monotonic clock."""


def set_up(recipe: Recipe, folder: RunFolder, group: Group, on_progress: OnProgress, closing: ExitStack) -> Session:
    """Load everything, and restore it from the newest checkpoint if there is one.

    Raises:
        QwenscopeError: the run cannot start or go on.
    """
    began = time.monotonic()
    saved = _find_checkpoint(recipe, folder, group)
    state: dict[str, Any] = saved.state if saved else {"step": 0, "seconds": 0.0}
    telemetry = _on_rank_0(group, lambda: _open_telemetry(recipe, folder, state["step"], closing))

    on_progress(Progress("loading model", folder.tokens, folder.target))
    torch.manual_seed(derive_seed(recipe.seed, "run"))  # nothing should draw from it; if something does, it repeats
    # What was resolved once stays: revisions of model and data, and the precision that "auto" measured.
    earlier = group.broadcast_object(lambda: _resolved(saved.state if saved else folder.recorded()))
    revisions = earlier["revisions"] or {"model": recipe.lm.revision, "corpus": None}
    lm, parity = _load_model(recipe, revisions, group, closing)
    stream = _on_rank_0(group, lambda: _open_corpus(recipe, lm, revisions["corpus"], closing))
    windows = Windows(lm, stream, recipe, plan_harvest(recipe, lm, group))
    closing.callback(windows.close)
    suite = Suite(recipe, lm, group, earlier["precision"] or {})
    _tune(lm, recipe, saved.state.get("tuned_kernels", {}) if saved else {}, group, folder)
    facts = {
        "probe": probe(lm, sites_of(recipe)),
        "recipe": recipe.model_dump(mode="json"),
        "revisions": {
            "model": lm.revision,
            **({} if recipe.lm.model_b is None else {"model_b": _second_revision(lm)}),
            "corpus": group.broadcast_object(lambda: dict(stream.revisions) if stream else None),
        },
        "precision": suite.precision(),
        "versions": folder.versions,
    }
    _warn(folder, check_ranks(group.all_gather_object(lambda: facts["probe"])))
    recorded = {name: facts[name] for name in ("revisions", "precision")}
    group.broadcast_object(lambda: folder.record(**recorded, parity=parity))

    guard = LossGuard()
    if saved is not None:
        on_progress(Progress("resuming", folder.tokens, folder.target))
        _warn(folder, group.all_gather_object(lambda: check_probe(saved.state["probe"], facts["probe"]))[0])
        _restore(saved, group, suite, windows, guard)
    return Session(
        recipe=recipe,
        folder=folder,
        group=group,
        widths={sae_id: lm.width(site) for sae_id, site in hooked_sites(recipe.hook_points).items()},
        windows=windows,
        suite=suite,
        closing_phase=_closing_phase(recipe, lm, windows, suite),
        guard=guard,
        telemetry=telemetry,
        facts=facts,
        resumed=saved.path if saved else None,
        step=state["step"],
        seconds=state["seconds"],
        began=began,
    )


def _find_checkpoint(recipe: Recipe, folder: RunFolder, group: Group) -> Checkpoint | None:
    """The newest checkpoint that verifies; the session begins in the folder's records with it, or with none."""
    saved, passed_over = load_newest(folder.checkpoints, wanted(recipe, group), group)
    for reason in passed_over:
        logger.warning("passed over a checkpoint: %s", reason)
    if saved is None:
        group.broadcast_object(lambda: check_checkpoint_expected(folder))
        if folder.status:
            logger.warning("%s holds no checkpoint yet: starting from the first token", folder.path)
    else:
        newest = saved.path
        check_same_recipe(saved.state["recipe"], recipe, newest)
        group.broadcast_object(lambda: set_aside_newer(folder.checkpoints, newest))
        folder.checkpoint, folder.tokens = newest.name, saved.state["tokens"]
        logger.info("going on from %s: %s of %s tokens", newest, f"{folder.tokens:,}", f"{folder.target:,}")
    if passed_over:
        folder.note_now(f"went on from {folder.checkpoint}; passed over: {'; '.join(passed_over)}")
    group.broadcast_object(lambda: folder.begin(recipe, passed_over, group.size))
    return saved


def _closing_phase(recipe: Recipe, lm: RowSource, windows: Windows, suite: Suite) -> ClosingPhase | None:
    if not recipe.training.closes:
        return None
    assert isinstance(lm, LanguageModel), "check_closing lets no other through"
    return ClosingPhase(lm, windows, suite, recipe)


def _on_rank_0(group: Group, open_it: Callable[[], T]) -> T | None:
    """What rank 0 opens for itself, None on the others; its error is raised on all."""
    opened: list[T] = []
    group.broadcast_object(lambda: opened.append(open_it()))
    return opened[0] if opened else None


def _open_telemetry(recipe: Recipe, folder: RunFolder, step: int, closing: ExitStack) -> Telemetry:
    telemetry = Telemetry(folder.path, recipe.telemetry.sinks, recipe.published().model_dump(mode="json"), step)
    closing.callback(telemetry.close)
    return telemetry


def _load_model(
    recipe: Recipe, revisions: Mapping[str, Any], group: Group, closing: ExitStack
) -> tuple[RowSource, dict[str, Any] | None]:
    """The language model at the run's revision, the same on all ranks; and how an engine compared with it."""
    pinned = recipe.lm.pinned(revisions)
    opened: list[tuple[RowSource, dict[str, Any] | None]] = []

    def load() -> str | None:
        check_hook_points(layer_kinds(load_config(pinned)), recipe.hook_points)  # before minutes of loading
        opened.append(open_source(pinned, recipe, revisions["corpus"], group.size, closing))
        return opened[0][0].revision

    models = group.all_gather_object(load)
    if len(set(models)) > 1:
        raise ModelError(f"ranks loaded unlike revisions of {recipe.lm.model} ({models}); set lm.revision")
    return opened[0]


def _tune(lm: RowSource, recipe: Recipe, saved: Choices, group: Group, folder: RunFolder) -> None:
    """Let kernels that tune themselves choose as the run did before, or on a batch like its own; on all ranks alike."""
    unknown = choose(saved)
    warm_up(lm, sites_of(recipe), recipe.corpus.batch_tokens // recipe.corpus.max_length, recipe.corpus.max_length)
    choose(group.broadcast_object(choices))
    if unknown:
        _warn(
            folder,
            f"{', '.join(unknown)}: flash-linear-attention has no such configuration here as this run chose: it goes "
            "on, but not to the same bits as without the interruption",
        )


def _second_revision(lm: RowSource) -> str | None:
    return lm.second.revision if isinstance(lm, LanguageModel) and lm.second is not None else None


def _open_corpus(recipe: Recipe, lm: RowSource, revisions: dict[str, str] | None, closing: ExitStack) -> CorpusStream:
    corpus = recipe.corpus
    stream = CorpusStream(corpus, lm.tokenizer, seed=recipe.seed, revisions=revisions, workers=corpus.workers)
    closing.callback(stream.close)
    return stream


def _restore(saved: Checkpoint, group: Group, suite: Suite, windows: Windows, guard: LossGuard) -> None:
    """Everything as it stood when the checkpoint was taken."""
    state = saved.state
    if state["threads"] != torch.get_num_threads():
        logger.warning(
            "saved with %d threads, going on with %d: not to the same bits (OMP_NUM_THREADS sets it)",
            state["threads"],
            torch.get_num_threads(),
        )
    group.all_gather_object(lambda: suite.load(saved.tensors))
    windows.restore(state["windows"])
    guard.restore(state["guard"])
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["rng"])), dtype=torch.uint8))


def _warn(folder: RunFolder, difference: str | None) -> None:
    if difference is not None:
        logger.warning("%s", difference)
        folder.note_now(difference)


def _resolved(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a state or run.json says of choices that are made once."""
    return {name: record.get(name) for name in ("revisions", "precision")}
