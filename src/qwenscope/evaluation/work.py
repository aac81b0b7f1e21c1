"""How much an evaluation computes, to say beforehand how long it takes and afterwards how far it is.

The unit is a parameter of the language model that a token passes; SAEs cost little beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from qwenscope.lm.forward import final_hidden, logits, unembedding
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site

OnProgress = Callable[[str, int, int], None]
"""Called with (phase, tokens done, tokens in all)."""
_PROBE = 256  # tokens


@dataclass(frozen=True)
class Work:
    """Units per token of the parts of an evaluation."""

    layers: tuple[int, ...]
    """Of each decoder layer."""
    head: int
    """Of the LM head."""

    @classmethod
    def of(cls, lm: LanguageModel) -> Work:
        """Of a whole language model; all experts of a layer count."""
        layers = tuple(sum(parameter.numel() for parameter in layer.parameters()) for layer in lm.layers)
        return cls(layers, unembedding(lm).numel())

    @property
    def whole(self) -> int:
        """Of a pass through all layers."""
        return sum(self.layers)

    def up_to(self, site: Site) -> int:
        """Of a pass that stops at `site`."""
        return sum(self.layers[: site.layer + 1])

    def from_(self, sites: Iterable[Site]) -> int:
        """Of passes that go on from each of `sites`, and their logits."""
        return sum(sum(self.layers[site.layer + 1 :]) + self.head for site in sites)

    def per_second(self, lm: LanguageModel) -> float:
        """Units per second here, from the second of two passes of a few tokens."""
        length = min(_PROBE, lm.known_positions or _PROBE)
        ids = torch.zeros((1, length), dtype=torch.int64, device=lm.device)
        for _ in range(2):
            began = time.monotonic()
            logits(lm, final_hidden(lm, ids)[0]).sum().item()
            seconds = time.monotonic() - began
        return length * (self.whole + self.head) / max(seconds, 1e-9)


class Meter:
    """Turns units into tokens of all splits, for `OnProgress`."""

    def __init__(self, on_progress: OnProgress, phase: str, units: int, tokens: int) -> None:
        self._on_progress, self._phase, self._units, self._tokens, self._done = on_progress, phase, units, tokens, 0
        on_progress(phase, 0, tokens)

    def add(self, units: int) -> None:
        """So much more is done."""
        self._done += units
        self._on_progress(self._phase, round(self._tokens * min(1.0, self._done / self._units)), self._tokens)
