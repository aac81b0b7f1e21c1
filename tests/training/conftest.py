"""The language model of runs in this room."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import make_language_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("lm"))
