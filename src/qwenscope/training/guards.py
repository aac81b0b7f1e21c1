"""Stop rules: what has gone wrong ends with its last good checkpoint, and what cannot go right does not begin."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from torch import Tensor

from qwenscope.errors import CheckpointError, TrainingError

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


def check_arguments(**possible: bool) -> None:
    """Raise a TrainingError that names the arguments of `SAETrainer` whose values are impossible."""
    wrong = [name for name, is_possible in possible.items() if not is_possible]
    if wrong:
        raise TrainingError(f"SAETrainer: impossible value of {', '.join(wrong)}; its docstring says what each may be")


def check_rows(x_BD: Tensor, width: int) -> Tensor:
    """`x_BD` itself; TrainingError unless it is [B, width] with B >= 1."""
    if x_BD.dim() != 2 or x_BD.shape[1] != width or not len(x_BD):
        raise TrainingError(f"a batch must be [B, {width}] with B >= 1, not {list(x_BD.shape)}")
    return x_BD


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise a CheckpointError unless `state` has the tensors of `own`, in the same shapes and dtypes."""
    for name in sorted(own.keys() | state.keys()):
        if name not in state or name not in own:
            raise CheckpointError(f"trainer state and trainer differ: only one of them has {name!r}")
        if own[name].shape != state[name].shape or own[name].dtype != state[name].dtype:
            raise CheckpointError(
                f"trainer state {name!r} is {state[name].dtype} {list(state[name].shape)}, "
                f"the trainer needs {own[name].dtype} {list(own[name].shape)}"
            )
