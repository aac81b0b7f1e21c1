"""Stop rules: a run that has gone wrong ends with its last good checkpoint, rather than going on to a bad result."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from qwenscope.errors import TrainingError

_HISTORY = 101  # logged losses that the running median looks back on
_ENOUGH = 10  # logged losses before a median is worth comparing with
_FACTOR = 10.0
_HOPELESS = 100.0  # FVU that no learning starts from: the rows' mean alone has 1
_PATIENCE = 5  # consecutive logged losses above the factor: an explosion, not an odd batch


class LossGuard:
    """Watches each SAE's logged FVU; its memory belongs to the checkpoint."""

    def __init__(self) -> None:
        self._recent: dict[str, list[float]] = {}
        self._above: dict[str, int] = {}

    def check(self, fvu: Mapping[str, float], step: int) -> None:
        """Look at one logged FVU per SAE.

        Raises:
            TrainingError: one stayed above 10 times its running median, or above 100, for 5 looks in a row.
        """
        for sae_id, value in fvu.items():
            recent = self._recent.setdefault(sae_id, [])
            usual = median(recent) if len(recent) >= _ENOUGH else _HOPELESS
            above = value > min(_FACTOR * usual, _HOPELESS)
            self._above[sae_id] = self._above.get(sae_id, 0) + 1 if above else 0
            if self._above[sae_id] >= _PATIENCE:
                limit = f"{_FACTOR:g} times its running median {usual:.3g}" if usual < _HOPELESS else f"{_HOPELESS:g}"
                raise TrainingError(
                    f"{sae_id}: FVU {value:.3g} at step {step} is more than {limit}; "
                    f"lower hook_points.{sae_id}.lr and start from the last checkpoint or afresh"
                )
            recent.append(value)
            del recent[:-_HISTORY]

    def state(self) -> dict[str, Any]:
        """JSON-able memory."""
        return {"recent": {key: list(values) for key, values in self._recent.items()}, "above": dict(self._above)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the memory of `state`."""
        self._recent = {key: list(values) for key, values in state["recent"].items()}
        self._above = dict(state["above"])
