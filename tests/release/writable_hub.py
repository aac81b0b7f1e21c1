"""The loopback Hub of tests/fake_hub.py, with what publishing needs: repositories, large files, commits, tags.

Every state that a reader could have seen is kept: `hub.commits` holds whole trees and `hub.tags` where each tag points.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from fake_hub import FakeHub, _Handler

TOKEN = "hf_" + "S3cretToken" * 3
_LARGE = (".safetensors", ".parquet")
_API = re.compile(r"/api/models/([^/]+/[^/]+)/(refs|tree|preupload|commit|tag)(?:/([^/]+))?")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch$")


class WritableHub(FakeHub):
    """A Hub that accepts one token and keeps what is pushed."""

    def __init__(self) -> None:
        super().__init__()
        self._server.RequestHandlerClass = type("Handler", (_WriteHandler,), {"hub": self})
        self.stored: dict[str, bytes] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.seen: Callable[[str], None] = lambda path: None
        """Called with the path of every request that was carried out, before it is answered."""

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        super().use(monkeypatch, cache)
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    def files(self, kind: str, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        return super().files(kind, repo, self.tags.get(repo, {}).get(revision or "", revision))

    def head(self, repo: str) -> dict[str, bytes]:
        """The main branch's files, without the Hub's own."""
        files = self.commits[("models", repo)][-1][1]
        return {name: data for name, data in files.items() if name != ".gitattributes"}


class _WriteHandler(_Handler):
    hub: WritableHub

    def do_PUT(self) -> None:  # noqa: N802 - the name that http.server calls
        self._serve()

    def _api(self, path: str, body: bytes, truncate: bool) -> None:
        fault = self.hub.next_fault(f"after {path}")  # carried out, but the answer is lost
        answer = self._answer(path, body)
        self.hub.seen(path)
        if fault is not None:
            self.close_connection = True
        elif answer is None:
            super()._api(path, body, truncate)
        else:
            status, value = answer
            self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"}, truncate)

    def _answer(self, path: str, body: bytes) -> tuple[int, Any] | None:
        if self.command in ("POST", "PUT") and not path.startswith("/lfs/"):
            given = self.headers.get("Authorization")
            if given != f"Bearer {TOKEN}":
                return 401, {"error": f"Invalid credentials {given}"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "digest"}
            self.hub.stored[oid] = body
            return 200, {}
        if match := _BATCH.search(path):
            return 200, {"transfer": "basic", "objects": [self._offer(entry) for entry in json.loads(body)["objects"]]}
        match = _API.search(unquote(path))
        if match is None or (match[2] == "tree" and self.hub.files("models", match[1], match[3]) is None):
            return None
        return self._repository(match[1], match[2], match[3], body)

    def _create(self, wanted: dict[str, str]) -> tuple[int, Any]:
        repo = f"{wanted['organization']}/{wanted['name']}"
        known = ("models", repo) in self.hub.commits
        if not known:
            self.hub.add("models", repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return (409 if known else 200), {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "error": "exists"}

    def _offer(self, entry: dict[str, Any]) -> dict[str, Any]:
        if entry["oid"] in self.hub.stored:
            return entry
        return entry | {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}}

    def _repository(self, repo: str, verb: str, revision: str | None, body: bytes) -> tuple[int, Any]:
        found = self.hub.files("models", repo, revision)
        if found is None:
            return 404, {"error": "not found"}
        sha, files = found
        if verb == "tree":
            return 200, [_entry(name, data) for name, data in files.items()]
        if verb == "refs":
            tags = self.hub.tags.get(repo, {}).items()
            refs = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": target} for name, target in tags]
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": sha}
            return 200, {"branches": [main], "tags": refs, "converts": []}
        if verb == "preupload":
            return 200, {"files": [_mode(entry["path"], files) for entry in json.loads(body)["files"]]}
        if verb == "tag":
            tags_of_repo = self.hub.tags.setdefault(repo, {})
            name = json.loads(body)["tag"]
            if name in tags_of_repo:
                return 409, {"error": "Tag already exists"}
            tags_of_repo[name] = sha
            return 200, {}
        return self._commit(repo, sha, files, [json.loads(line) for line in body.splitlines()])

    def _commit(self, repo: str, sha: str, files: dict[str, bytes], lines: list[dict[str, Any]]) -> tuple[int, Any]:
        if lines[0]["value"].get("parentCommit", sha) != sha:
            return 412, {"error": "A commit has happened since"}
        tree = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    return 400, {"error": "unknown large file"}
                tree[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        oid = self.hub.add("models", repo, tree)
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"}


def _mode(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    oid = _entry(path, files[path])["oid"] if path in files else None
    return {
        "path": path,
        "uploadMode": "lfs" if path.endswith(_LARGE) else "regular",
        "shouldIgnore": False,
        "oid": oid,
    }


def _entry(name: str, data: bytes) -> dict[str, Any]:
    content = data
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
    if name.endswith(_LARGE):
        oid = hashlib.sha256(data).hexdigest()
        content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": len(content)}
    return entry | {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
