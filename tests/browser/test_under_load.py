"""The real server on loopback: clients that go away, queues that fill, half a request, the end by a signal."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from planted_suite import PLANTED_LATENT

from qwenscope.features.browser import listening

PUSH = {"sae": "sae_delta", "latent": PLANTED_LATENT, "strength": 1.0, "mode": "add", "unit": "max", "where": "all"}
READ = ("POST", "/api/read", {"text": "order status", "chat": False})
PAGES: list[tuple[str, str, Any]] = [
    ("GET", path, None) for path in ("/", "/page/app.js", "/api/suite", "/api/latent/sae_delta/3", "/api/search?q=that")
]


class Served:
    """`qwenscope browse` in a process of its own."""

    def __init__(self, index: Path) -> None:
        command = [sys.executable, "-m", "qwenscope", "browse", str(index), "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.port = int(self.process.stderr.readline().split()[0].rstrip("/").rsplit(":", 1)[1])

    def ask(self, method: str, path: str, value: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        body = None if value is None else json.dumps(value)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status != 503 or int(answer.headers["Retry-After"]) > 0
        return answer.status, answer.read()

    def abandon(self, tokens: int, pieces: bool) -> None:
        """Ask for a steer and go away, after its first bytes or at once."""
        body = json.dumps({"prompt": "order status", "tokens": tokens, "pushes": [PUSH]})
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(
                f"POST /api/steer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            if pieces:
                connection.recv(64)

    @property
    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    @property
    def resident(self) -> int:
        """Bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self, number: int) -> tuple[int, str]:
        """(exit code, what it wrote on stderr)."""
        self.process.send_signal(number)
        _, written = self.process.communicate(timeout=60)
        return self.process.returncode, written


@pytest.fixture
def served(index: Path) -> Iterator[Served]:
    opened = Served(index)
    yield opened
    opened.process.kill()
    opened.process.wait()
    assert opened.process.stderr is not None
    opened.process.stderr.close()


def _abandon_and_ask(served: Served, abandoned: int, mixed: int) -> None:
    assert served.ask(*READ)[0] == 200
    with ThreadPoolExecutor(16) as pool:  # once each, so that pools and caches stand
        list(pool.map(lambda i: served.ask(*PAGES[i % len(PAGES)]), range(100)))
        threads, resident = served.threads, served.resident
        list(pool.map(lambda i: served.abandon(200, pieces=i % 8 == 0), range(abandoned)))
        asked = [READ if i % 50 == 0 else PAGES[i % len(PAGES)] for i in range(mixed)]
        found = list(pool.map(lambda one: served.ask(*one)[0], asked))
    assert set(found) == {200}
    assert served.ask(*READ)[0] == 200
    assert served.threads <= threads + 40  # the pool that reads SQLite grows to 40 once, and no further
    assert served.resident < resident + (64 << 20)
    code, written = served.end(signal.SIGINT)
    assert code == 130
    assert "Traceback" not in written


def test_clients_that_go_away_leave_the_model_to_others(served: Served) -> None:
    _abandon_and_ask(served, 24, 200)


@pytest.mark.slow
def test_two_hundred_that_go_away_and_two_thousand_others(served: Served) -> None:
    _abandon_and_ask(served, 200, 2000)


def test_a_full_queue_says_so_and_pages_go_on(served: Served) -> None:
    steer = ("POST", "/api/steer", {"prompt": "order status", "tokens": 2, "pushes": [PUSH]})
    with ThreadPoolExecutor(121) as pool:
        found = [pool.submit(served.ask, *(steer if i % 2 else READ)) for i in range(120)]
        assert served.ask("GET", "/")[0] == 200
        assert not all(one.done() for one in found), "the page waited for the model"
        statuses = {one.result()[0] for one in found}
    assert 200 in statuses
    assert statuses <= {200, 503}


def test_a_signal_ends_a_generation_under_way(served: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    body = json.dumps({"prompt": "order status", "tokens": 200, "pushes": [PUSH]})
    connection.request("POST", "/api/steer", body, {"Content-Type": "application/json"})
    assert connection.getresponse().read(10)
    with socket.create_connection(("127.0.0.1", served.port)) as half:
        half.sendall(b"PUT /api/notes/sae_delta/1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
        code, written = served.end(signal.SIGTERM)
    assert code == -signal.SIGTERM
    assert written.strip() == ""


def test_answers_leave_at_once() -> None:
    with listening.listener_on(0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP  # what asyncio asks before it sets TCP_NODELAY
