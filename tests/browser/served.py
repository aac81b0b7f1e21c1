"""`qwenscope browse` in a process of its own, and clients that ask it, wait or go away."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Served:
    """The server of one index."""

    def __init__(self, index: Path, source: str | None = None) -> None:
        """`source`: the `src` of another checkout that is to serve."""
        command = [sys.executable, "-m", "qwenscope", "browse", str(index), "--port", "0"]
        environment = os.environ if source is None else {**os.environ, "PYTHONPATH": source}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        self.port = int(self.process.stderr.readline().split()[0].rstrip("/").rsplit(":", 1)[1])

    def ask(self, method: str, path: str, value: Any = None, seconds: float = 120) -> tuple[int, bytes]:
        """Status and body of the answer.

        Raises:
            OSError: no answer within `seconds`.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        body = None if value is None else json.dumps(value)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status != 503 or int(answer.headers["Retry-After"]) > 0
        return answer.status, answer.read()

    def abandon(self, steer: Any, pieces: bool) -> None:
        """Ask for a steer and go away, after its first bytes or at once."""
        body = json.dumps(steer)
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(
                f"POST /api/steer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            if pieces:
                connection.recv(64)

    @property
    def threads(self) -> int:
        """Of the process."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    @property
    def resident(self) -> int:
        """Bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal; (exit code, what it wrote on stderr) once the whole process has ended."""
        self.process.send_signal(number)
        _, written = self.process.communicate(timeout=60)
        return self.process.returncode, written


@contextmanager
def serve_apart(index: Path, source: str | None = None) -> Iterator[Served]:
    """A server that is gone when the block ends."""
    opened = Served(index, source)
    try:
        yield opened
    finally:
        opened.process.kill()
        opened.process.communicate()
