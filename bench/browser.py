"""What a person waits for the feature browser's answers: `qwenscope browse` in a process of its own, on loopback.

    python bench/browser.py INDEX SAE latency [--against SRC] [--rounds 6]
    python bench/browser.py INDEX SAE crowd [--against SRC]
    python bench/browser.py INDEX SAE abandoned

`latency`: 1 and 8 clients, each on one connection that it keeps, as a web browser does, ask for a page and the suite
in turn, 20 ms after the last answer: milliseconds until an answer was there whole, p50 and p99 of each round, the
quickest first. `crowd`: 60 steers and 60 reads at once: how many were answered or refused within 25 s, after how long,
and what a page took meanwhile. `abandoned`: 200 steers whose clients go away, then 2,000 mixed requests of 16 clients,
then a read and Ctrl-C. `--against` is the `src` of another checkout, whose server is asked in turn with this one.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "browser"))

from served import Served, serve_apart

PAUSE = 0.02
REQUESTS = 40
"""Of each client in a round."""
READ = ("POST", "/api/read", {"text": "order status"})
PATIENCE = 25.0
"""Seconds that the clients of `crowd` wait."""


def main() -> None:
    """Start the servers, let the clients ask, print what they waited."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("sae")
    parser.add_argument("what", choices=["latency", "crowd", "abandoned"])
    parser.add_argument("--against")
    parser.add_argument("--rounds", type=int, default=6)
    chosen = parser.parse_args()
    push = {"sae": chosen.sae, "latent": 3, "strength": 0.5, "mode": "add", "unit": "norm", "where": "all"}
    measure: Callable[[dict[str, Served]], Any] = {
        "latency": lambda servers: latency(servers, chosen.rounds),
        "crowd": lambda servers: {name: crowd(served, push) for name, served in servers.items()},
        "abandoned": lambda servers: {name: abandoned(served, push, chosen.sae) for name, served in servers.items()},
    }[chosen.what]
    sources = {"this": None} | ({"other": chosen.against} if chosen.against else {})
    with ExitStack() as stack:
        found = measure({name: stack.enter_context(serve_apart(chosen.index, src)) for name, src in sources.items()})
    print(json.dumps(found))


def latency(servers: dict[str, Served], rounds: int) -> dict[str, dict[str, list[list[float]]]]:
    """Milliseconds, [p50, p99] per round, by number of clients and server."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for clients in (1, 8):
        for _ in range(rounds):
            for name, served in servers.items():
                found.setdefault(f"{clients} clients", {}).setdefault(name, []).append(_round(served.port, clients))
    return {kind: {name: sorted(r) for name, r in by.items()} for kind, by in found.items()}


def _round(port: int, clients: int) -> list[float]:
    waited: list[float] = []
    threads = [threading.Thread(target=_client, args=(port, waited)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _percentiles(waited)


def _client(port: int, waited: list[float]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for i in range(REQUESTS):
        begin = time.perf_counter()
        connection.request("GET", ("/page/app.js", "/api/suite")[i % 2])
        connection.getresponse().read()
        waited.append(1000 * (time.perf_counter() - begin))
        time.sleep(PAUSE)


def crowd(served: Served, push: dict[str, Any]) -> dict[str, Any]:
    """60 steers and 60 reads at once, and pages one after the other as long as they wait."""
    steer = ("POST", "/api/steer", {"prompt": "hello", "tokens": 8, "pushes": [push]})
    alone = {name: _timed(served, ask)[1] for name, ask in {"load": READ, "read": READ, "steer": steer}.items()}
    with ThreadPoolExecutor(120) as pool:
        asked = [(name, pool.submit(_timed, served, ask)) for name, ask in [("steer", steer), ("read", READ)] * 60]
        pages = []
        while not all(one.done() for _, one in asked):
            pages.append(_timed(served, ("GET", "/", None)))
            time.sleep(PAUSE)
    after = [_timed(served, ("GET", "/", None)) for _ in range(20)]
    answers = [(f"{name}: {one.result()[0]}", one.result()[1]) for name, one in asked]
    kinds = {kind: [seconds for of, seconds in answers if of == kind] for kind, _ in answers}
    return {
        "seconds alone": alone,
        "answers": {kind: {"number": len(took), "p50, max s": _spread(took)} for kind, took in kinds.items()},
        "pages meanwhile": {
            "answers": Counter(code for code, _ in pages),
            "p50, max s": _spread([t for _, t in pages]),
        },
        "pages afterwards": {
            "answers": Counter(code for code, _ in after),
            "p50, max s": _spread([t for _, t in after]),
        },
    }


def abandoned(served: Served, push: dict[str, Any], sae: str) -> dict[str, Any]:
    """200 steers that nobody waits for and 2,000 mixed requests: what is left of the server."""
    steer = {"prompt": "order status", "tokens": 200, "pushes": [push]}
    pages = ["/", "/page/app.js", "/api/suite", f"/api/latent/{sae}/3", "/api/search?q=that"]
    mixed = [READ if i % 50 == 0 else ("GET", pages[i % len(pages)], None) for i in range(2000)]
    served.ask(*READ)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda one: served.ask(*one), mixed[1:200]))  # pools and caches stand
        before = {"threads": served.threads, "MB": served.resident >> 20}
        list(pool.map(lambda i: served.abandon(steer, pieces=i % 8 == 0), range(200)))
        _, read_at_once = _timed(served, READ)
        answers = Counter(pool.map(lambda one: served.ask(*one)[0], mixed))
    code, read_seconds = _timed(served, READ)
    after = {"threads": served.threads, "MB": served.resident >> 20}
    begin = time.perf_counter()
    exit_code, written = served.end(signal.SIGINT)
    return {
        "before": before,
        "after": after,
        "answers": answers,
        "read right after the abandoned, s": read_at_once,
        "read at the end": [code, read_seconds],
        "Ctrl-C": {"s": round(time.perf_counter() - begin, 2), "exit code": exit_code, "said": written},
    }


def _timed(served: Served, ask: tuple[str, str, Any]) -> tuple[int | str, float]:
    """(status or what went wrong, seconds)."""
    begin = time.perf_counter()
    try:
        status: int | str = served.ask(*ask, seconds=PATIENCE)[0]
    except OSError as error:
        status = type(error).__name__
    return status, round(time.perf_counter() - begin, 3)


def _spread(seconds: list[float]) -> list[float]:
    return [round(float(np.median(seconds)), 3), max(seconds)] if seconds else []


def _percentiles(waited: list[float]) -> list[float]:
    return [round(float(np.percentile(waited, share)), 2) for share in (50, 99)]


if __name__ == "__main__":
    main()
