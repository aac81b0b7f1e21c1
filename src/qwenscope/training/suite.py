"""All SAEs of a run that this rank trains, whole or some latents of them: one step of each per batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor

from qwenscope.errors import TrainingError
from qwenscope.lm.model import RowSource
from qwenscope.lm.sites import Site, hooked_sites
from qwenscope.machine import memory_errors_named
from qwenscope.parallel.group import Group
from qwenscope.parallel.owners import overlaps, owners, state_of
from qwenscope.parallel.shard import shards
from qwenscope.recipe import Recipe
from qwenscope.sae.sae import SAE
from qwenscope.sae.selection import Precision
from qwenscope.training.building import build_trainer
from qwenscope.training.gradients import Downstream
from qwenscope.training.graph import GraphedSteps
from qwenscope.training.metrics import StepMetrics

T = TypeVar("T")
_LARGEST = 1e15  # root mean square of rows whose squares, summed over a batch, float32 holds with room to spare
_LESS_MEMORY = "set activations.overlap to false, or lower activations.window_tokens or training.batch_size"
NUMBERS = ("fvu", "loss", "aux_loss", "l0", "dead", "grad_norm", "kl")
"""Of StepMetrics, in metrics.jsonl under these names where they are; `dead` as a share there."""


def rows_spread(rows_RD: Tensor) -> tuple[float, float]:
    """Root mean square of the elements' deviations from the rows' mean, and of the elements, in float64."""
    count, mean_D = rows_RD.numel(), rows_RD.mean(0, dtype=torch.float64)
    deviations = sum(float((chunk.double() - mean_D).square().sum()) for chunk in torch.split(rows_RD, 1024))
    return (deviations / count) ** 0.5, (deviations / count + float(mean_D.square().mean())) ** 0.5


def wanted(recipe: Recipe, group: Group) -> Callable[[str], bool]:
    """Which of a checkpoint's files this rank reads, by stem: those with latents of its own."""
    pieces = owners(recipe, group.size)[group.rank]
    return lambda stem: any(overlaps(stem, piece) for piece in pieces)


class Suite:
    """The trainers of this rank, by SAE id; several ranks make the same calls in the same order."""

    def __init__(
        self, recipe: Recipe, lm: RowSource, group: Group, precision: Mapping[str, Precision | Literal["auto"]]
    ) -> None:
        """
        Args:
            recipe: What to train.
            lm: On whose device, and how wide.
            group: Whose ranks share the SAEs.
            precision: Per SAE what an earlier session settled on; the recipe's where it says nothing.
        """
        self._points, self._group = recipe.hook_points, group
        self._sites = hooked_sites(recipe.hook_points)
        self._pieces = {piece.sae_id: piece for piece in owners(recipe, group.size)[group.rank]}
        self._trainers = {
            sae_id: build_trainer(recipe, lm, sae_id, precision.get(sae_id, recipe.training.precision), shard)
            for sae_id, shard in shards(recipe, group).items()
        }
        self._graphed = GraphedSteps(self._trainers)
        self._last: dict[str, StepMetrics] = {}
        self._finite: list[tuple[int, str, Tensor]] = []  # flags of steps not looked at yet

    def precision(self) -> dict[str, Precision]:
        """What the trainers of all ranks settled on."""
        return self._of_all(lambda: {sae_id: trainer.precision for sae_id, trainer in self._trainers.items()})

    def calibrate(self, rows: Mapping[Site, Tensor]) -> None:
        """Fit every SAE to the first rows {site: x_RD} of a run.

        Raises:
            TrainingError: on all ranks, if rows of one cannot be learnt from.
        """
        self._group.all_gather_object(lambda: self._check_rows(rows))
        for sae_id, trainer in self._trainers.items():
            trainer.calibrate(rows[self._sites[sae_id]])

    def _check_rows(self, rows: Mapping[Site, Tensor]) -> None:
        for sae_id, trainer in self._trainers.items():
            site = self._sites[sae_id]
            spread, size = rows_spread(rows[site])
            of = f"{sae_id}: its {len(rows[site]):,} calibration rows at {site}"
            if spread <= 1e-6 * size:  # less is rounding
                raise TrainingError(
                    f"{of} do not differ: nothing to learn from; raise training.calibration_tokens if it is small, "
                    "else look at lm.model's weights"
                )
            if size > _LARGEST:
                raise TrainingError(f"{of} are about {size:.1g}, too large for float32; look at lm.model's weights")
            if not trainer.normalise and spread < trainer.lr / 10:
                raise TrainingError(
                    f"{of} spread by {spread:.1g}, far below the learning rate {trainer.lr:g}, so that each step would "
                    "overshoot; set training.normalise to true"
                )

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from a checkpoint's {stem: tensors}, whatever ranks wrote them.

        Raises:
            CheckpointError: they are of other trainers.
        """
        for sae_id, trainer in self._trainers.items():
            trainer.load_state_dict(state_of(self._pieces[sae_id], tensors))

    def step(self, batch: Mapping[Site, Tensor], step: int, downstream: Mapping[str, Downstream] | None = None) -> None:
        """One optimiser step of every SAE on {site: x_BD}; `step` is its number, from 1. `downstream`: of each SAE.

        Raises:
            ResourceError: it does not fit the device.
        """
        rows = {sae_id: batch[self._sites[sae_id]] for sae_id in self._trainers}
        with memory_errors_named("a step of all SAEs", _LESS_MEMORY):
            graphed = None if downstream else self._graphed(rows)
        for sae_id, trainer in self._trainers.items():
            with memory_errors_named(f"a step of {sae_id}", _LESS_MEMORY):
                if graphed:
                    metrics = graphed[sae_id]
                else:
                    metrics = trainer.step(rows[sae_id], downstream[sae_id] if downstream else None)
                self._last[sae_id] = metrics
            self._finite.append((step, sae_id, metrics.finite))

    def check_finite(self) -> None:
        """Look at the flags of all steps since the last look: one transfer. The trainer has skipped a bad update.

        Raises:
            TrainingError: a loss or a gradient was not finite.
        """
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

    def numbers(self) -> dict[str, dict[str, float]]:
        """The last step's numbers of each SAE, those of other ranks too.

        Raises:
            TrainingError: as `check_finite`.
        """
        return self._of_all(self._own_numbers)

    def _own_numbers(self) -> dict[str, dict[str, float]]:
        """Of this rank's SAEs: one transfer from the device for all."""
        self.check_finite()
        found = {
            (sae_id, name): value.float()
            for sae_id, metrics in self._last.items()
            for name in NUMBERS
            if (value := getattr(metrics, name)) is not None
        }
        saes: dict[str, dict[str, float]] = {sae_id: {} for sae_id in self._last}
        for (sae_id, name), value in zip(found, torch.stack([*found.values()]).tolist() if found else (), strict=True):
            saes[sae_id][name] = value
        for sae_id, metrics in self._last.items():
            saes[sae_id]["dead"] /= self._points[sae_id].dict_size
            saes[sae_id]["lr"] = metrics.lr
        return saes

    def state(self) -> dict[str, dict[str, Tensor]]:
        """{stem: tensors} for a checkpoint: the trainers' own tensors, not copies."""
        return {self._pieces[sae_id].stem: trainer.state_dict() for sae_id, trainer in self._trainers.items()}

    def finished(self) -> Iterator[tuple[str, SAE | None]]:
        """Each SAE of the run as it stands, in the recipe's order, whole on one rank and None on the others."""
        for sae_id in self._points:
            trainer = self._trainers.get(sae_id)
            yield sae_id, None if trainer is None else trainer.collect()

    def _of_all(self, act: Callable[[], dict[str, T]]) -> dict[str, T]:
        """What `act` says of each rank's own SAEs, for all of them, in the recipe's order."""
        merged = {sae_id: value for part in self._group.all_gather_object(act) for sae_id, value in part.items()}
        return {sae_id: merged[sae_id] for sae_id in self._points}
