"""A small Hugging Face Hub on the loopback: real HTTP, so that the real client code runs against it.

It serves what huggingface_hub asks for when it reads (repository info, tree, paths-info, resolve with ranges), for
datasets and models, and fails on demand: status codes, connection resets, bodies cut short.

    with FakeHub() as hub:
        hub.add("datasets", "org/name", {"data/train.parquet": payload})
        hub.fail("train.parquet", 503, "reset")      # the next two requests whose path holds the words
        ... HfApi(endpoint=hub.endpoint) ...

`hub.use(monkeypatch, tmp_path)` points huggingface_hub's own defaults at it and takes the waits out of retries.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

Fault = int | str  # a status code, "reset", or "truncate"

_INFO = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/revision/([^/]+))?$")
_TREE = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?$")
_PATHS = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)/paths-info/([^/]+)$")
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


class FakeHub:
    """Repositories in memory; each `add` is a new commit and old commits stay readable."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.commits: dict[tuple[str, str], list[tuple[str, dict[str, bytes]]]] = {}
        self.faults: deque[tuple[str, Fault]] = deque()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, kind: str, repo: str, files: dict[str, bytes]) -> str:
        """Commit `files` (the whole tree) to a repository and return the commit's sha."""
        history = self.commits.setdefault((kind, repo), [])
        sha = hashlib.sha1(f"{repo}{len(history)}{sorted(files)}".encode()).hexdigest()
        history.append((sha, dict(files)))
        return sha

    def fail(self, words: str, *faults: Fault) -> None:
        """Let the next requests whose path holds `words` fail, one fault each."""
        self.faults.extend((words, fault) for fault in faults)

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Make this hub huggingface_hub's default, with an empty cache, and let retries wait not at all."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def next_fault(self, path: str) -> Fault | None:
        with self.lock:
            self.requests.append(path)
            for position, (words, fault) in enumerate(self.faults):
                if words in path:
                    del self.faults[position]
                    return fault
        return None

    def files(self, kind: str, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        history = self.commits.get((kind, repo), [])
        wanted = [commit for commit in history if revision in (None, "main", commit[0])]
        return wanted[-1] if wanted else None


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read `hub.requests` instead."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.hub.next_fault(path)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif isinstance(fault, int):
            self._send(fault, b'{"error": "injected"}', {"Retry-After": "0"})
        elif match := _FILE.search(path):
            self._file(match, truncate=fault == "truncate")
        else:
            self._api(path, body, truncate=fault == "truncate")

    def _api(self, path: str, body: bytes, truncate: bool) -> None:
        match = _INFO.search(path) or _TREE.search(path) or _PATHS.search(path)
        commit = self.hub.files(match[1], match[2], match[3]) if match else None
        if match is None or commit is None:
            self._missing(
                "RepoNotFound" if match is None or (match[1], match[2]) not in self.hub.commits else "RevisionNotFound"
            )
            return
        sha, files = commit
        if match.re is _INFO:
            siblings = [{"rfilename": name} for name in files]
            answer: Any = {"id": match[2], "sha": sha, "private": False, "tags": [], "siblings": siblings}
            card = files.get("README.md", b"")
            if card.startswith(b"---\n"):
                answer["cardData"] = yaml.safe_load(card.split(b"---\n")[1])
        elif match.re is _TREE:
            prefix = f"{match[4]}/" if match[4] else ""
            answer = [_entry(name, data) for name, data in files.items() if name.startswith(prefix)]
        else:
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else re.findall(r"paths=([^&]+)", body.decode())
            answer = [_entry(unquote(name), files[unquote(name)]) for name in wanted if unquote(name) in files]
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, truncate)

    def _file(self, match: re.Match[str], truncate: bool) -> None:
        commit = self.hub.files(match[1] or "models", match[2], match[3])
        if commit is None or match[4] not in commit[1]:
            self._missing("RevisionNotFound" if commit is None else "EntryNotFound")
            return
        data = commit[1][match[4]]
        headers = {
            "X-Repo-Commit": commit[0],
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        status, wanted = 200, data
        if span := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(span[1]), int(span[2] or len(data) - 1) + 1
            status, wanted = 206, data[start:stop]
            headers["Content-Range"] = f"bytes {start}-{start + len(wanted) - 1}/{len(data)}"
        self._send(status, wanted, headers, truncate)

    def _missing(self, code: str) -> None:
        self._send(404, b'{"error": "not found"}', {"X-Error-Code": code})

    def _send(self, status: int, data: bytes, headers: dict[str, str], truncate: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if truncate else data)
        if truncate:
            self.close_connection = True


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
