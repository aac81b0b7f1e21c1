"""How strong a push may be: from where it changes the text to where the text is no text any more.

A continuation counts as text while the unsteered model, which has read the same prompt, does not find it much less
likely per token than its own, and while it does not go in circles. Both are rules of thumb, written down so that no one
picks strengths by eye; they say nothing about what the text is about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from qwenscope.features.steering import Steering, generate
from qwenscope.lm.forward import final_hidden, logits
from qwenscope.lm.model import LanguageModel

LADDER = tuple(round(2 ** (step / 2), 4) for step in range(-10, 5))
"""Strengths that are tried, 0.03 to 4."""
NATS = 2.0  # by which a token of the text may be less likely than one of the unsteered text, on average
DISTINCT = 0.5  # least share of different pairs of neighboring tokens


@dataclass(frozen=True)
class Trial:
    """One strength and what it did."""

    strength: float
    text: str
    surprise: float
    """Mean nats per token of the text under the unsteered model."""
    distinct: float
    """Share of different pairs of neighboring tokens."""
    changed: bool
    """Whether the text is another one than the unsteered."""
    is_text: bool


@dataclass(frozen=True)
class Range:
    """What was tried, from weak to strong, up to the first strength whose text is none."""

    unsteered: Trial
    trials: tuple[Trial, ...]

    @property
    def weakest(self) -> float | None:
        """The least strength that changed the text; None if none did before the text broke."""
        return next((trial.strength for trial in self.trials if trial.changed and trial.is_text), None)

    @property
    def strongest(self) -> float | None:
        """The largest strength of those tried below the first that breaks the text."""
        return next((trial.strength for trial in reversed(self.trials) if trial.is_text), None)


def text_range(
    lm: LanguageModel,
    prompt_ids: Sequence[int],
    steering: Steering,
    *,
    max_new_tokens: int = 40,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Range:
    """Try the strengths of LADDER upwards, greedily decoded, until the text is no text.

    Args:
        lm: whole model with its LM head.
        prompt_ids: see `prompt_tokens`.
        steering: whose strength is tried; with unit "norm" they are shares of the stream's norm, alike for all models.
        max_new_tokens: per strength.
        on_trial: told of each, the unsteered one first, as soon as it is done.
    """
    own = _trial(lm, prompt_ids, [], 0.0, max_new_tokens, None)
    on_trial(own)
    trials: list[Trial] = []
    for strength in LADDER:
        found = _trial(lm, prompt_ids, [replace(steering, strength=strength)], strength, max_new_tokens, own)
        on_trial(found)
        trials.append(found)
        if not found.is_text:
            break
    return Range(own, tuple(trials))


def _trial(
    lm: LanguageModel,
    prompt_ids: Sequence[int],
    steerings: Sequence[Steering],
    strength: float,
    max_new_tokens: int,
    own: Trial | None,
) -> Trial:
    text = "".join(generate(lm, prompt_ids, steerings, max_new_tokens))
    ids = list(lm.tokenizer(text, add_special_tokens=False).input_ids)
    surprise, distinct = _surprise(lm, prompt_ids, ids), _distinct(ids)
    least = DISTINCT if own is None else min(DISTINCT, own.distinct)
    likely = own is None or not ids or surprise <= own.surprise + NATS
    changed = own is not None and text != own.text
    return Trial(strength, text, surprise, distinct, changed, likely and distinct >= least and math.isfinite(surprise))


@torch.no_grad()
def _surprise(lm: LanguageModel, prompt_ids: Sequence[int], ids: Sequence[int]) -> float:
    """Mean nats per token of `ids` after the prompt; 0 where there are none."""
    if not ids:
        return 0.0
    whole = torch.tensor([[*prompt_ids, *ids]], device=lm.device)
    hidden_TD = final_hidden(lm, whole)[0, len(prompt_ids) - 1 : -1]
    spread_TV = logits(lm, hidden_TD).double().log_softmax(-1)
    return -float(spread_TV.gather(1, whole[0, len(prompt_ids) :, None]).mean())


def _distinct(ids: Sequence[int]) -> float:
    pairs = list(pairwise(ids))
    return len(set(pairs)) / len(pairs) if pairs else 1.0
