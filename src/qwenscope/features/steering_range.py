"""How strong a push may be: from where it changes the text to where the text is no text any more.

A continuation counts as text while the unsteered model, which reads it along, does not find it much less likely per
token than its own, and while it does not go in circles. Both are rules of thumb, written down so that no one picks
strengths by eye; they say nothing about what the text is about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from qwenscope.features.continuation import Step, divergence, write_on
from qwenscope.features.steering import Steering
from qwenscope.lm.model import LanguageModel

LADDER = tuple(round(2 ** (step / 2), 4) for step in range(-10, 5))
"""Strengths that are tried, 0.03 to 4."""
NATS = 2.0  # by which a token of the text may be less likely than one of the unsteered text, on average
DISTINCT = 0.5  # least share of different pairs of neighboring tokens
KL_BOUND = 1.0
"""Nats per token by which the distributions that a text was drawn from may differ from the unsteered ones, on average,
at the strength that is proposed to start with."""
BETWEEN, FINER = 7, 3
"""Strengths that are tried between the last that changes nothing and the first that changes too much, and how often."""


@dataclass(frozen=True)
class Trial:
    """One strength and what it did."""

    strength: float
    text: str
    surprise: float
    """Mean nats per token of the text under the unsteered model."""
    kl: float
    """Mean nats per token by which next-token distributions diverged from the unsteered ones after the same text."""
    distinct: float
    """Share of different pairs of neighboring tokens."""
    changed: bool
    """Whether the text is another one than the unsteered."""
    is_text: bool


@dataclass(frozen=True)
class Range:
    """What was tried, by `text_range` from weak to strong."""

    unsteered: Trial
    trials: tuple[Trial, ...]

    @property
    def sound(self) -> tuple[Trial, ...]:
        """The trials below the first whose text is none."""
        broken = next((n for n, trial in enumerate(self.trials) if not trial.is_text), len(self.trials))
        return self.trials[:broken]

    @property
    def weakest(self) -> float | None:
        """The least strength that changed the text; None if none did before the text broke."""
        return next((trial.strength for trial in self.sound if trial.changed), None)

    @property
    def strongest(self) -> float | None:
        """The largest strength of those tried below the first that breaks the text."""
        return self.sound[-1].strength if self.sound else None

    @property
    def start(self) -> float | None:
        """The largest sound strength that changes the text and whose divergence is within KL_BOUND. Where none is, the
        least that changes it at all, though it goes in circles, if that one is within the bound; else None."""
        changed = [trial for trial in self.trials if trial.changed]
        fit = [trial for trial in self.sound if trial.changed] or changed[:1]
        fit = [trial for trial in fit if trial.kl <= KL_BOUND]
        return fit[-1].strength if fit else None


def text_range(lm: LanguageModel, prompt_ids: Sequence[int], steering: Steering, *, max_new_tokens: int = 40) -> Range:
    """Try the strengths of LADDER, greedily decoded in one batch, and some between where all of them are too much.

    Args:
        lm: whole model with its LM head.
        prompt_ids: see `prompt_tokens`.
        steering: whose strength is tried; with unit "norm" they are shares of the stream's norm, alike for all models.
        max_new_tokens: per strength.
    """
    found = tried(lm, prompt_ids, _each(steering, LADDER), max_new_tokens)
    for _ in range(FINER):
        high = next((n for n, trial in enumerate(found.trials) if trial.changed), None)
        if found.start is not None or high is None:
            break
        low, top = (found.trials[high - 1].strength if high else LADDER[0] / 4), found.trials[high].strength
        between = [low * (top / low) ** (n / (BETWEEN + 1)) for n in range(1, BETWEEN + 1)]
        finer = tried(lm, prompt_ids, _each(steering, between), max_new_tokens)
        found = Range(found.unsteered, (*found.trials[:high], *finer.trials, *found.trials[high:]))
    return found


def tried(lm: LanguageModel, prompt_ids: Sequence[int], pushes: Sequence[Steering], max_new_tokens: int) -> Range:
    """What each push does, as it is and in the order given, greedily decoded in one batch beside the unsteered text."""
    runs = [[], *([push] for push in pushes)]
    steps: list[list[Step]] = [[] for _ in runs]
    sums = [[0.0, 0.0] for _ in runs]
    for step in write_on(lm, prompt_ids, runs, max_new_tokens, shadows=True):
        if not step.ends:
            steps[step.run].append(replace(step, logits_V=step.logits_V[:0], clean_V=None))
            assert step.clean_V is not None
            sums[step.run][0] -= float(step.clean_V.double().log_softmax(0)[step.token])
            sums[step.run][1] += divergence(step.logits_V, step.clean_V)
    own = _trial(0.0, steps[0], sums[0], None)
    rest = zip(pushes, steps[1:], sums[1:], strict=True)
    return Range(own, tuple(_trial(push.strength, written, summed, own) for push, written, summed in rest))


def _each(steering: Steering, strengths: Sequence[float]) -> list[Steering]:
    return [replace(steering, strength=strength) for strength in strengths]


def _trial(strength: float, steps: Sequence[Step], sums: Sequence[float], own: Trial | None) -> Trial:
    text, ids = "".join(step.text for step in steps), [step.token for step in steps]
    surprise, kl = (total / max(1, len(ids)) for total in sums)
    distinct = _distinct(ids)
    least = DISTINCT if own is None else min(DISTINCT, own.distinct)
    likely = own is None or not ids or surprise <= own.surprise + NATS
    changed = own is not None and text != own.text
    is_text = likely and distinct >= least and math.isfinite(surprise)
    return Trial(strength, text, surprise, kl, distinct, changed, is_text)


def _distinct(ids: Sequence[int]) -> float:
    pairs = list(pairwise(ids))
    return len(set(pairs)) / len(pairs) if pairs else 1.0
