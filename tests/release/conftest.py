"""A hand-made run and its release, shared by the room's tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_run import make_run
from writable_hub import WritableHub

from qwenscope.release.package import release


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    release(make_run(folder / "run"), folder / "release")
    return folder / "release"


@pytest.fixture
def released(built: Path, tmp_path: Path) -> Path:
    """A release folder of one's own."""
    return Path(shutil.copytree(built, tmp_path / "release"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WritableHub]:
    with WritableHub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub
