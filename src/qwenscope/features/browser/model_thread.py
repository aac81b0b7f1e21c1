"""One thread that runs the language model, job after job, and a bounded queue before it.

Requests wait for their answers in the event loop and occupy no thread. Who goes away cancels the job: a queued one
leaves the queue at once, a running one ends at its next piece or at the next `check`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from math import ceil
from statistics import fmean
from time import monotonic

from qwenscope.errors import QwenscopeError

WAITING = 16
"""Jobs that may wait; more are refused at once, rather than answered when nobody waits any more."""
FIRST_SECONDS = 5.0
"""What a job is taken to last before one has ended."""


class BusyError(QwenscopeError):
    """The queue is full, or the server ends; try again after `seconds`, when what waits now should be done."""

    def __init__(self, message: str, seconds: float = 1.0) -> None:
        super().__init__(message)
        self.seconds = ceil(seconds)


class CancelledJobError(Exception):
    """Ends the job of somebody who went away, from inside."""


class Job:
    """Pieces of text on their way from the model's thread to one request: an async iterator."""

    def __init__(self, work: Callable[[], Iterator[str]], on_cancel: Callable[[Job], None]) -> None:
        self.work = work
        self.cancelled = False
        self._on_cancel = on_cancel
        self._loop = asyncio.get_running_loop()
        self._answers: asyncio.Queue[str | Exception] = asyncio.Queue()

    def cancel(self) -> None:
        """Nobody waits for it any more; harmless when it has ended."""
        self.cancelled = True
        self._on_cancel(self)

    def tell(self, answer: str | Exception) -> None:
        """Hand over a piece, or how it ended; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._answers.put_nowait, answer)
        except RuntimeError:  # the loop has ended, and the request with it
            self.cancelled = True

    def __aiter__(self) -> Job:
        return self

    async def __anext__(self) -> str:
        answer = await self._answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer


class ModelThread:
    """The thread, started with the first job; a daemon, so that it never keeps the process alive."""

    def __init__(self, waiting: int = WAITING) -> None:
        self._limit = waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._lasted: deque[float] = deque([FIRST_SECONDS], maxlen=8)  # seconds of the last jobs
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], Iterator[str]]) -> Job:
        """Put `work`, which the model's thread iterates, at the queue's end.

        Raises:
            BusyError: the queue is full, or closed.
        """
        job = Job(work, self._forget)
        with self._changed:
            if self._closed:
                raise BusyError("the server is ending")
            if len(self._waiting) >= self._limit:
                seconds = fmean(self._lasted) * (len(self._waiting) + 1)
                message = f"{self._limit} requests wait for the language model; try again in {seconds:.0f} s"
                raise BusyError(message, seconds)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="language model", daemon=True)
                self._thread.start()
            self._waiting.append(job)
            self._changed.notify()
        return job

    def check(self, *_: object) -> None:
        """Called by running work, as often as it likes.

        Raises:
            CancelledJobError: nobody waits for the work any more.
        """
        if self._running is not None and self._running.cancelled:
            raise CancelledJobError

    def close(self, timeout: float = 1.0) -> bool:
        """Cancel everything; True once the thread has ended, False if it has not within `timeout` seconds."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                job.cancelled = True
                job.tell(BusyError("the server is ending"))
            self._waiting.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    def _forget(self, job: Job) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            began = monotonic()
            try:
                for piece in job.work():
                    if job.cancelled:
                        break
                    job.tell(piece)
                job.tell(StopAsyncIteration())
            except Exception as error:  # the request's to handle, not this thread's
                job.tell(error)
            with self._changed:
                self._lasted.append(monotonic() - began)

    def _next(self) -> Job | None:
        """The next job; None when closed."""
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._waiting or self._closed)
            self._running = None if self._closed else self._waiting.popleft()
            return self._running
