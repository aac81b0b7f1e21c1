"""Results that are shown beside an index: whoever makes them checks them, here they are served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target

Score = Callable[[Target, LanguageModel, Sequence[Any], bool], list[dict[str, Any]]]
"""(suite, its language model, rows of conversations, whether token by token) -> an object for each."""


@dataclass(frozen=True)
class Result:
    """One of them."""

    name: str
    value: dict[str, Any]
    """JSON with `kind` and `latents`, [{"sae", "latent", ...}], all of which the index has."""
    summary: str
    """One line."""
    score: Score | None = None
    """Of a monitor: how it scores conversations."""
