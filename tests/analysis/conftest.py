"""One planted suite for the room, and files of conversations with and without its planted word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_suite import make_corpus, make_release

from qwenscope.files import write_text


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analysis")
    return make_release(folder, make_corpus(folder / "chats.jsonl"))


@pytest.fixture(scope="session")
def write_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[dict[str, Any]]], Path]:
    folder = tmp_path_factory.mktemp("piles")

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = folder / f"{name}.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
