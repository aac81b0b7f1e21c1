"""The model's thread: whom it refuses is told when what waits now should be done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from qwenscope.features.browser import model_thread
from qwenscope.features.browser.model_thread import FIRST_SECONDS, WAITING, BusyError, ModelThread


def test_a_full_queue_says_when_it_should_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the last jobs: here the clock says that each lasts 20 s."""
    clock = [0.0]
    monkeypatch.setattr(model_thread, "monotonic", lambda: clock[0])

    def work_of(gate: threading.Event | None) -> Callable[[], Iterator[str]]:
        def work() -> Iterator[str]:
            yield "begun"
            if gate is not None:
                gate.wait(60)
            clock[0] += 20

        return work

    async def refused_after(thread: ModelThread, gate: threading.Event) -> int:
        running = thread.submit(work_of(gate))
        assert await anext(running) == "begun"
        waiting = [thread.submit(work_of(None)) for _ in range(WAITING)]
        with pytest.raises(BusyError, match=f"{WAITING} requests wait") as refused:
            thread.submit(work_of(None))
        gate.set()
        for job in (running, *waiting):
            assert [piece async for piece in job] == ([] if job is running else ["begun"])
        return refused.value.seconds

    def refused() -> int:
        with ThreadPoolExecutor(1) as aside:  # a browser of other tests may hold this thread's event loop
            return aside.submit(asyncio.run, refused_after(thread, threading.Event())).result()

    thread = ModelThread()
    try:
        assert refused() == FIRST_SECONDS * (WAITING + 1)
        assert refused() == 20 * (WAITING + 1)
    finally:
        assert thread.close()
