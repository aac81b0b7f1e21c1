"""Every file that is made to be published, taken apart: nothing in it tells of the machine or its owner."""

from __future__ import annotations

import gzip
import json
import platform
import re
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny_run import make_language_model, tiny_recipe

from qwenscope.corpus.tool_use import write_tool_use
from qwenscope.evaluation.run import evaluate
from qwenscope.features.browser.export import export_site
from qwenscope.features.index import build_index
from qwenscope.files import public_name
from qwenscope.release.neuronpedia import export_with_index
from qwenscope.release.package import release
from qwenscope.sae.formats import EXPORTS, export_suite
from qwenscope.training.run import train
from qwenscope.training.telemetry import _SINKS

SECRETS = ("private-folder", "hunter2", "alice", "4-secret-name", "her-own-machine")
CREDENTIALS = re.compile(rb"//[^/@\s\"']+:[^/@\s\"']+@|\bhf_[A-Za-z0-9]{16,}")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all that can be published of one run, whose recipe holds what no one else is to see."""
    patch = pytest.MonkeyPatch()
    patch.setattr(socket, "gethostname", lambda: "her-own-machine")
    patch.setattr(platform, "node", lambda: "her-own-machine")
    patch.setenv("USER", "alice")
    home = tmp_path_factory.mktemp("private-folder")
    write_tool_use(home / "chats.jsonl", 200, 1)
    recipe = tiny_recipe(
        make_language_model(home / "my-model"),
        corpus__sources=[{"name": "files", "weight": 1.0, "path": str(home / "chats.jsonl")}],
        activations__cache="memory://alice:hunter2@cache/4-secret-name",
        corpus__held_out_share=0.2,
        training__tokens=1000,
    )
    run, out = home / "my-run", tmp_path_factory.mktemp("out")
    train(recipe, run)
    evaluate(run, tokens=300)
    release(run, out / "release")
    build_index(run, home / "index", tokens=1000, data=home / "chats.jsonl")
    export_site(home / "index", out / "site")
    for name in EXPORTS:
        export_suite(run, name, out / name)
    export_with_index(run, home / "index", out / "neuronpedia-with-index")
    patch.undo()
    return out


def contents(path: Path) -> Iterator[bytes]:
    """The file's bytes, and what is packed in them."""
    data = path.read_bytes()
    yield data
    if path.suffix == ".gz":
        yield gzip.decompress(data)
    elif path.suffix == ".z":
        yield zlib.decompress(data)
    elif path.suffix == ".parquet":
        yield json.dumps(pq.read_table(path).to_pylist(), default=str).encode()


def test_nothing_of_this_machine_is_published(published: Path) -> None:
    names = [*SECRETS, str(published.parent), str(Path.home())]
    files = [path for path in published.rglob("*") if path.is_file()]
    assert len(files) > 60
    for path in files:
        where = path.relative_to(published)
        assert not any(name in str(where) for name in names), where
        for data in contents(path):
            for name in names:
                assert name.encode() not in data, (where, name)
            assert not re.search(rb"/(?:home|root|Users)/\w", data), where
            assert not CREDENTIALS.search(data), where
    assert "my-model" in (published / "release" / "README.md").read_text()


def test_a_tracker_gets_the_published_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Tracker:
        def __init__(self, run: Path, config: object, last_step: int) -> None:
            seen.append(json.dumps(config))

        def log(self, step: int, values: object) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setitem(_SINKS, "wandb", Tracker)
    cache = "memory://alice:hunter2@cache/x"
    train(
        tiny_recipe(
            make_language_model(tmp_path / "my-model"),
            telemetry__sinks=["wandb"],
            activations__cache=cache,
            training__tokens=640,
        ),
        tmp_path / "run",
    )
    assert len(seen) == 1
    assert "my-model" in seen[0]
    assert str(tmp_path) not in seen[0]
    assert "hunter2" not in seen[0]


@pytest.mark.parametrize(
    ("model", "public"),
    [
        ("Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.5-35B-A3B"),
        ("gpt2", "gpt2"),
        ("standin", "standin"),
        ("/home/alice/models/mine", "mine"),
        ("~/mine", "mine"),
        ("../alice/mine", "mine"),
        ("alice/models/mine", "mine"),
        ("https://alice:hunter2@host/mine", "mine"),
    ],
)
def test_a_models_public_name_is_no_path(model: str, public: str) -> None:
    assert public_name(model) == public
