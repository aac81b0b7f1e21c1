"""Labels for 4,096 latents against an endpoint on loopback that delays, refuses and answers nonsense; a kill between.

    python bench/explain.py [--latents 4096] [--sequential 64] [--concurrency 16] [--delay 0.6]

The endpoint, a process of its own, takes DELAY seconds for an answer (the offline rule's), up to half more or less; of
its answers 2 in 100 are 429 (with Retry-After: 1), 2 are 500, 2 no JSON. The run with concurrency is killed (SIGKILL)
after a third, stopped (SIGTERM) after another, and started again each time; the start of all three processes counts.
The sequential run labels a sample, its wall time is scaled. Random content. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from features_content import random_index

from qwenscope.checksums import write_checksums
from qwenscope.features.clients import EndpointClient, OfflineClient
from qwenscope.features.integrity import FILES
from qwenscope.features.label import explain
from qwenscope.features.store import Index, read_explanations

SAE = "sae_attn_mid"
FAULTS = [429] * 2 + [500] * 2 + [200] * 2
STARTED = 8.0
"""Seconds after which a run is surely past its imports."""


class Endpoint(BaseHTTPRequestHandler):
    """Chat completions, late and sometimes none; GET says what was answered."""

    lock = threading.Lock()
    answered: ClassVar = Counter[str]()
    faults: ClassVar = Counter[str]()
    choose = random.Random(0)
    delay = 0.0

    def do_GET(self) -> None:
        """Counts: questions answered well, answers beyond the first to one of them, faults."""
        with self.lock:
            answers, questions = self.answered.total(), len(self.answered)
            found = {"questions": questions, "answered_twice": answers - questions, "faults": dict(self.faults)}
            if self.path == "/forget":
                self.answered.clear(), self.faults.clear()
        self._say(200, json.dumps(found).encode())

    def do_POST(self) -> None:
        """One answer, or a fault."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            fault = FAULTS[n] if (n := self.choose.randrange(100)) < len(FAULTS) else None
            delay = self.delay * self.choose.uniform(0.5, 1.5)
        time.sleep(delay)
        if fault is not None:
            with self.lock:
                self.faults[str(fault) if fault > 200 else "nonsense"] += 1
            self._say(fault, b"<html>busy</html>")
            return
        asked = json.loads(body)
        text = OfflineClient().complete("", asked["messages"][1]["content"], 0)
        self._say(200, json.dumps({"choices": [{"message": {"content": text}}]}).encode())
        with self.lock:
            self.answered[hashlib.sha256(body).hexdigest()] += 1

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def _serve(delay: float, tell: Callable[[int], None]) -> None:
    Endpoint.delay = delay

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Endpoint) as server:
        tell(server.server_port)
        server.serve_forever()


def main() -> None:
    """Start the endpoint, run both ways, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--sequential", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--delay", type=float, default=0.6)
    chosen = parser.parse_args()
    reader, writer = multiprocessing.Pipe(duplex=False)
    endpoint = multiprocessing.Process(target=_serve, args=(chosen.delay, writer.send), daemon=True)
    endpoint.start()
    address = f"http://127.0.0.1:{reader.recv()}"
    with tempfile.TemporaryDirectory() as folder:
        random_index(Path(folder), chosen.latents)
        write_checksums(Path(folder), FILES)
        last = chosen.latents - 1
        index, begun = Index(folder), time.perf_counter()
        for _ in explain(index, EndpointClient(f"{address}/v1", "one"), [(SAE, n) for n in range(chosen.sequential)]):
            pass
        one = time.perf_counter() - begun
        _asked(address, "/forget")
        begun = time.perf_counter()
        asked: dict[str, Any] = {}
        for end in (signal.SIGKILL, signal.SIGTERM, None):
            process = _start(folder, address, f"0-{last}", chosen.concurrency, "many")
            if end is not None:
                time.sleep(max(STARTED, one / chosen.sequential * chosen.latents / chosen.concurrency / 3))
                process.send_signal(end)
            if process.wait() not in (0, -signal.SIGKILL, 128 + signal.SIGTERM):
                raise SystemExit("explain failed")
            asked[end.name if end else "end"] = _asked(address)
        many = time.perf_counter() - begun
        labelled = sum(record["client"] == "many" for _, _, record in read_explanations(Index(folder)))
    endpoint.terminate()
    sequential = one / chosen.sequential * chosen.latents
    found = {
        "latents": chosen.latents,
        "labelled": labelled,
        "asked_until": asked,
        "delay": chosen.delay,
        "seconds": round(many, 1),
        "sequential_seconds": round(sequential, 1),
        "share_of_sequential": round(many / sequential, 4),
    }
    print(json.dumps(found, indent=2))


def _asked(address: str, path: str = "/") -> dict[str, Any]:
    with urllib.request.urlopen(address + path) as response:
        found: dict[str, Any] = json.load(response)
    return found


def _start(folder: str, address: str, latents: str, concurrency: int, model: str) -> subprocess.Popen[bytes]:
    options = ["--sae", SAE, "--latents", latents, "--endpoint", f"{address}/v1", "--model", model]
    command = [sys.executable, "-m", "qwenscope", "explain", folder, *options, "--concurrency", str(concurrency)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
