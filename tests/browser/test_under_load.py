"""The real server on loopback: clients that go away, queues that fill, half a request, the end by a signal."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from planted_suite import PLANTED_LATENT
from served import Served, serve_apart
from starlette.types import ASGIApp
from visiting import serving

from qwenscope.features.browser import edge, listening

PUSH = {"sae": "sae_delta", "latent": PLANTED_LATENT, "strength": 1.0, "mode": "add", "unit": "max", "where": "all"}
READ = ("POST", "/api/read", {"text": "order status"})
PAGES: list[tuple[str, str, Any]] = [
    ("GET", path, None) for path in ("/", "/page/app.js", "/api/suite", "/api/latent/sae_delta/3", "/api/search?q=that")
]


@pytest.fixture
def served(index: Path) -> Iterator[Served]:
    with serve_apart(index) as opened:
        yield opened


def _abandon_and_ask(served: Served, abandoned: int, mixed: int) -> None:
    assert served.ask(*READ)[0] == 200
    steer = {"prompt": "order status", "tokens": 200, "pushes": [PUSH]}
    with ThreadPoolExecutor(16) as pool:  # once each, so that pools and caches stand
        list(pool.map(lambda i: served.ask(*PAGES[i % len(PAGES)]), range(100)))
        threads, resident = served.threads, served.resident
        list(pool.map(lambda i: served.abandon(steer, pieces=i % 8 == 0), range(abandoned)))
        asked = [READ if i % 50 == 0 else PAGES[i % len(PAGES)] for i in range(mixed)]
        found = list(pool.map(lambda one: served.ask(*one)[0], asked))
    assert set(found) == {200}
    assert served.ask(*READ)[0] == 200
    assert served.threads <= threads + 40  # the pool that reads SQLite grows to 40 once, and no further
    assert served.resident < resident + (64 << 20)
    assert served.end(signal.SIGINT) == (130, "")


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


def test_what_is_dropped_halfway_prints_nothing(served: Served) -> None:
    heads = ["POST /api/read", "POST /api/steer", f"PUT /api/notes/sae_delta/{PLANTED_LATENT}", "GET /"]
    for head in heads:
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(
                f"{head} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                'Content-Length: 999\r\n\r\n{"text": "ord'.encode()
            )
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )  # a reset, not a goodbye
    assert served.ask(*READ)[0] == 200
    assert served.end(signal.SIGTERM) == (-signal.SIGTERM, "")


@pytest.mark.parametrize("half", ["", "GET / HTTP/1.1\r\nHost: local"])
def test_half_a_request_is_not_waited_for(app: ASGIApp, monkeypatch: pytest.MonkeyPatch, half: str) -> None:
    monkeypatch.setattr(listening, "REQUEST_SECONDS", 0.2)
    with serving(app) as address, socket.create_connection(("127.0.0.1", urlsplit(address).port)) as connection:
        connection.settimeout(60)
        connection.sendall(half.encode())
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_half_a_body_is_not_waited_for(app: ASGIApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "BODY_SECONDS", 0.2)
    head = "POST /api/read HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with serving(app) as address, socket.create_connection(("127.0.0.1", urlsplit(address).port)) as connection:
        connection.settimeout(60)
        connection.sendall(head.encode())
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 400
        assert b"did not arrive" in answer.read()


def test_answers_leave_at_once() -> None:
    with listening.listener_on(0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP  # what asyncio asks before it sets TCP_NODELAY
