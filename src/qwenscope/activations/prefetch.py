"""One window in advance: made in a thread of its own, on a CUDA stream of its own, beside the steps on the last one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from qwenscope.activations.cache import Window


@dataclass(frozen=True)
class _Made:
    window: Window | None
    event: torch.cuda.Event | None
    """Reached when the rows are there; None on a CPU, where they are already."""


class Prefetcher:
    """Makes at most one window at a time, and hands it over to the thread and stream that train."""

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: where the rows will be.
        """
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="harvest")
        self._pending: Future[_Made] | None = None

    def begin(self, make: Callable[[], Window | None]) -> None:
        """Let the thread `make` the next window; none is being made or waits to be taken."""
        assert self._pending is None, "one window at a time"
        before = None
        if self._stream is not None:
            before = torch.cuda.Event()  # type: ignore[no-untyped-call]
            before.record(torch.cuda.current_stream(self._device))
        self._pending = self._thread.submit(self._make, make, before)

    @property
    def begun(self) -> bool:
        """Whether a window is being made, or waits to be taken."""
        return self._pending is not None

    def take(self) -> Window | None:
        """The window that was begun, when it is whole; whatever `make` raised is raised here."""
        assert self._pending is not None, "no window was begun"
        pending, self._pending = self._pending, None
        made = pending.result()
        if made.event is not None and made.window is not None:
            training = torch.cuda.current_stream(self._device)
            training.wait_event(made.event)
            for rows_RD in made.window.harvest.rows.values():
                rows_RD.record_stream(training)  # their memory is not given away before the last gather has read them
        return made.window

    def settle(self) -> None:
        """Wait until nothing is being made; what was begun can still be taken."""
        if self._pending is not None:
            wait([self._pending])

    def drop(self) -> None:
        """Wait, and let go of what was begun."""
        self.settle()
        self._pending = None

    def close(self) -> None:
        """Wait for a window in the making, drop it, and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pending = None

    def _make(self, make: Callable[[], Window | None], before: torch.cuda.Event | None) -> _Made:
        if self._stream is None or before is None:
            return _Made(make(), None)
        with torch.cuda.stream(self._stream):  # its device too, which is the thread's own matter
            # The steps on the window before this one must be through: until then its memory is not free for a third.
            before.synchronize()
            window = make()
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return _Made(window, event)
