"""What a person waits for the feature browser's answers: `qwenscope browse` in a process of its own, on loopback.

    python bench/browser.py INDEX [--clients 8] [--requests 200]

Each client keeps one connection, as a web browser does, and asks for pages, the suite, latents and searches in turn, 20
ms after the last answer. Prints one JSON object: milliseconds until an answer was there whole.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import numpy as np

PAUSE = 0.02


def main() -> None:
    """Start the server, let the clients ask, print what they waited."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    chosen = parser.parse_args()
    command = [sys.executable, "-m", "qwenscope", "browse", chosen.index, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            port = urlsplit(process.stderr.readline().split()[0]).port
            assert port is not None
            found = {str(clients): _measure(port, clients, chosen.requests) for clients in (1, chosen.clients)}
        finally:
            process.terminate()
    print(json.dumps({"milliseconds_by_clients": found}, indent=2))


def _measure(port: int, clients: int, requests: int) -> dict[str, dict[str, float]]:
    waited: dict[str, list[float]] = {}
    threads = [threading.Thread(target=_client, args=(port, i, requests, waited)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waited["all"] = [one for times in waited.values() for one in times]
    return {
        kind: {f"p{share}": round(float(np.percentile(times, share)), 2) for share in (50, 99)}
        for kind, times in waited.items()
    }


def _client(port: int, number: int, requests: int, waited: dict[str, list[float]]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/api/suite")
    sae = next(iter(json.load(connection.getresponse())["saes"]))
    for i in range(requests):
        latent = (number * requests + i) % 128
        kind, path = [
            ("page", "/page/app.js"),
            ("suite", "/api/suite"),
            ("latent", f"/api/latent/{sae}/{latent}"),
            ("search", "/api/search?q=the"),
        ][i % 4]
        begin = time.perf_counter()
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        waited.setdefault(kind, []).append(1000 * (time.perf_counter() - begin))
        assert answer.status == 200, path
        time.sleep(PAUSE)


if __name__ == "__main__":
    main()
