"""What a person waits for the feature browser's answers: `qwenscope browse` in a process of its own, on loopback.

    python bench/browser.py INDEX [--against SRC] [--rounds 6]

Each client keeps one connection, as a web browser does, and asks for a page and the suite in turn, 20 ms after the last
answer. `--against` is the `src` of another checkout, whose server is asked in turn with this one. Prints one JSON
object: milliseconds until an answer was there whole, p50 and p99 of each round, the quickest round first.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

PAUSE = 0.02
REQUESTS = 40
"""Of each client in a round."""


def main() -> None:
    """Start the servers, let the clients ask, print what they waited."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("--against")
    parser.add_argument("--rounds", type=int, default=6)
    chosen = parser.parse_args()
    sources = {"this": os.environ.get("PYTHONPATH", "")} | ({"other": chosen.against} if chosen.against else {})
    found: dict[str, dict[str, list[list[float]]]] = {}
    with ExitStack() as stack:
        ports = {name: stack.enter_context(_browse(chosen.index, source)) for name, source in sources.items()}
        for clients in (1, 8):
            for _ in range(chosen.rounds):
                for name, port in ports.items():
                    found.setdefault(f"{clients} clients", {}).setdefault(name, []).append(_round(port, clients))
    print(json.dumps({kind: {name: sorted(r) for name, r in by.items()} for kind, by in found.items()}))


@contextmanager
def _browse(index: str, source: str) -> Iterator[int]:
    """The port of a server from `source`."""
    command = [sys.executable, "-m", "qwenscope", "browse", index, "--port", "0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": source}
    ) as process:
        assert process.stderr is not None
        try:
            yield int(process.stderr.readline().split()[0].rstrip("/").rsplit(":", 1)[1])
        finally:
            process.terminate()


def _round(port: int, clients: int) -> list[float]:
    waited: list[float] = []
    threads = [threading.Thread(target=_client, args=(port, waited)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [round(float(np.percentile(waited, share)), 2) for share in (50, 99)]


def _client(port: int, waited: list[float]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for i in range(REQUESTS):
        begin = time.perf_counter()
        connection.request("GET", ("/page/app.js", "/api/suite")[i % 2])
        connection.getresponse().read()
        waited.append(1000 * (time.perf_counter() - begin))
        time.sleep(PAUSE)


if __name__ == "__main__":
    main()
