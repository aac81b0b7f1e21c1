"""One planted suite and its index for the whole room."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted_suite import make_corpus, make_release

from qwenscope.features.index import build_index
from qwenscope.features.store import Index
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target, open_target

TOKENS = 2500


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "chats.jsonl")


@pytest.fixture(scope="session")
def release(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_release(tmp_path_factory.mktemp("suite"), corpus)


@pytest.fixture(scope="session")
def index(release: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("index") / "index"
    build_index(release, out, data=corpus, tokens=TOKENS)
    return Index(out)


@pytest.fixture(scope="module")
def target(release: Path) -> Target:
    return open_target(release)


@pytest.fixture(scope="module")
def lm(target: Target) -> LanguageModel:
    return target.language_model()
