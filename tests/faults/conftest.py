"""One tiny language model and one uninterrupted run per session: what every interrupted run must equal."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import Reference, make_language_model, make_reference


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="session")
def reference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tiny_model, tmp_path_factory.mktemp("reference") / "run")
