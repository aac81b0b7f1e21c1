"""Signals that end or checkpoint a run at the next step boundary, never in the middle of one."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):  # noqa: N818 - an ending that was asked for, not an error
    """A signal asked the run to stop and it did, with a checkpoint. `exit_code` is the shell's 128 + signal number."""

    def __init__(self, signum: int, tokens: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after {tokens:,} tokens; --resume goes on from there"
        )
        self.signum = signum
        self.exit_code = 128 + signum


class SignalWatch:
    """While the block runs, SIGTERM, SIGINT and SIGHUP (a closed terminal; unless it was ignored before, as by nohup)
    set `stop`, SIGUSR1 sets `checkpoint`; the old handlers come back after.

    The first stop signal hands SIGTERM and SIGINT back to the kernel's default, so that a second one ends the process
    at once, even in the middle of a long call into native code; of SIGHUP a closing terminal may send several, and
    further ones do nothing. Outside the main thread nothing is installed and nothing is seen.

    Args:
        launched: by torchrun, which hands on a signal that its workers may have got from the scheduler already, and
            kills those that linger: further stop signals do nothing.
        said: what the first stop signal writes to stderr, as a line of its own.
    """

    def __init__(self, launched: bool = False, said: str = "") -> None:
        self._launched, self._said = launched, said
        self.stop: int | None = None
        self.checkpoint = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in _STOP:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_stop)
            self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_checkpoint)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_stop(self, signum: int, frame: FrameType | None) -> None:
        if self._said and self.stop is None:
            os.write(2, f"\n{self._said}\n".encode())  # a handler may strike in the middle of any other writing
        self.stop = signum
        if not self._launched:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)

    def _on_checkpoint(self, signum: int, frame: FrameType | None) -> None:
        self.checkpoint = True
