"""How connections are held: answers leave at once, half a request is not waited for, and the end comes quickly."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10.0
"""How long the head of a request may take."""
GRACE_SECONDS = 0.5
"""What is still being answered when the server ends has this long."""


def listener_on(port: int) -> socket.socket:
    """A socket on 127.0.0.1; who connects from now on waits instead of being refused.

    Its protocol is named: asyncio sets TCP_NODELAY on sockets that say they are TCP, and without it the second packet
    of every answer on a kept connection waits 40 ms for the first one's acknowledgement.

    Raises:
        OSError, OverflowError: the port cannot be had.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    return listener


class Connection(H11Protocol):
    """Closes a connection on which a request was begun, or none, and does not arrive."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client connected."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Bytes of one or several requests came."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client, or this server, closed the connection."""
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """Ends what is under way when it is told to end, rather than waiting for it."""

    def __init__(self, app: Any, on_end: Callable[[], object]) -> None:
        super().__init__(uvicorn.Config(app, http=Connection, ws="none", log_level="warning", access_log=False))
        self._on_end = on_end
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn with each signal; it passes them on at its end, where an event loop may swallow SIGINT."""
        self.interrupted |= sig == signal.SIGINT
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn once a signal came."""
        await asyncio.get_running_loop().run_in_executor(None, self._on_end)
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._abort)
        await super().shutdown(sockets)

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
