"""All splits of an evaluation, one by one: on all of their conversations, or on as many as an interval takes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from qwenscope.corpus.conversation import Conversation
from qwenscope.evaluation.kept import Kept
from qwenscope.evaluation.measure import SplitMeasurement, SplitMeter
from qwenscope.evaluation.pairs import Sums, compare_split
from qwenscope.evaluation.work import Meter, OnProgress
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target

Splits = dict[str, list[Conversation]]

PILOT = 8  # the first attempt at an interval reads this part of the conversations
NARROWED = ("fvu", "ce_recovered_zero", "ce_recovered_mean")


class Meters:
    """Measures a target's SAEs on its language model."""

    def __init__(self, target: Target, lm: LanguageModel, on_progress: OnProgress) -> None:
        self._target, self._lm, self._on_progress = target, lm, on_progress
        self._kept = Kept(lm, target.recipe)
        self._rate: float | None = None

    def measured(self, splits: Splits, until: float | None) -> tuple[Splits, dict[str, SplitMeasurement]]:
        """All conversations, or as many as `until` takes; which ones, and what they say."""
        return (splits, self.measure(splits)) if until is None else self.measure_until(splits, until)

    def measure(self, splits: Mapping[str, list[Conversation]]) -> dict[str, SplitMeasurement]:
        """Every split whole; the phase that is reported says how long that takes."""
        target = self._target
        meters = {
            split: SplitMeter(
                self._lm, target.saes, target.sites, conversations, target.recipe, self._kept, target.targets
            )
            for split, conversations in splits.items()
        }
        units = sum(meter.units for meter in meters.values())
        if self._rate is None:
            self._rate = next(iter(meters.values())).work.per_second(self._lm)
        phase = f"measuring {len(target.saes)} SAEs on {' and '.join(splits)}, {_roughly(units / self._rate)}"
        shown = Meter(self._on_progress, phase, units, sum(meter.tokens for meter in meters.values()))
        return {split: meter.run(shown.add) for split, meter in meters.items()}

    def measure_until(self, splits: Splits, width: float) -> tuple[Splits, dict[str, SplitMeasurement]]:
        """The first conversations of each split whose intervals are no wider than `width`, or all of them.

        A part is measured, and then as much as its intervals say that it takes: they narrow with the root of the
        number of conversations.
        """
        used: Splits = {}
        measured: dict[str, SplitMeasurement] = {}
        for split, conversations in splits.items():
            count = max(2, len(conversations) // PILOT)
            while split not in measured:
                part = conversations[:count]
                found = self.measure({split: part})[split]
                widest = _widest(found.sums, self._target.recipe.seed)
                if widest <= width or count >= len(conversations):
                    used[split], measured[split] = part, found
                needed = 1.1 * count * (widest / width) ** 2 if math.isfinite(widest) else PILOT * count
                count = min(len(conversations), max(count + 1, math.ceil(needed)))
        return used, measured


def _widest(sums: Mapping[str, Sums], seed: int) -> float:
    """The widest interval of any SAE; infinite where one does not exist."""
    intervals = compare_split([], sums, seed)["intervals"]
    found = [
        named[name]
        for sae_id, named in intervals.items()
        for name in (NARROWED[:1] if np.isnan(sums[sae_id]["ce_spliced"]).all() else NARROWED)
    ]
    return max(math.inf if pair is None else pair[1] - pair[0] for pair in found)


def _roughly(seconds: float) -> str:
    return f"about {max(1, round(seconds))} s" if seconds < 100 else f"about {round(seconds / 60)} min"
