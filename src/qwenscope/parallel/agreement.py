"""What all ranks do next for the sake of signals, clocks and saves that have ended: the same, at the same step."""

from __future__ import annotations

import time
from dataclasses import dataclass

from qwenscope.parallel.group import Group

_SECONDS = 0.25  # between two agreements of several ranks


@dataclass(frozen=True)
class Decision:
    """What is done after a step: as one rank wants it, or as all have agreed."""

    stop: int | None = None
    """A signal's number."""
    save: bool = False
    saved: bool = False
    """The save in flight has ended on every rank."""


class Agreement:
    """Makes one decision of all ranks' wishes.

    One process decides as it wants, at every step. Several ranks agree about four times a second: rank 0 reckons
    how many steps that is, and says so when they agree.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._step: int | None = None
        self._next = 0
        self._time = time.monotonic()

    def after(self, step: int, wanted: Decision) -> Decision:
        """What this rank wants after `step` -> what all do; nothing before the time has come to agree."""
        if self._group.size == 1:
            return wanted
        if step < self._next:
            return Decision()
        now = time.monotonic()
        taken = 1 if self._step is None else max(1, step - self._step)
        steps = min(4 * taken, max(1, round(taken * _SECONDS / max(now - self._time, 1e-9))))
        of_all = self._group.all_gather_object(lambda: (wanted.stop, wanted.save, wanted.saved, steps))
        self._step, self._time, self._next = step, now, step + of_all[0][3]
        return Decision(
            next((stop for stop, _, _, _ in of_all if stop is not None), None),
            any(save for _, save, _, _ in of_all),
            all(saved for _, _, saved, _ in of_all),
        )
