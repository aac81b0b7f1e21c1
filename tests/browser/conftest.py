"""A served index of the planted suite with results, its export, and a headless Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_results import SHARED, write_results
from planted_suite import make_corpus, make_release
from playwright.sync_api import Browser, expect, sync_playwright
from starlette.types import ASGIApp
from visiting import FLAGS, Visit, serving

from qwenscope.analysis.results import read_results
from qwenscope.features.browser.export import export_site
from qwenscope.features.browser.notes import Notes
from qwenscope.features.browser.server import make_app
from qwenscope.features.index import build_index
from qwenscope.features.store import Index

expect.set_options(timeout=60_000)  # a busy machine is no failure


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted suite's index, in whose corpus and vocabulary there is a token of HTML."""
    folder = tmp_path_factory.mktemp("browser")
    corpus = make_corpus(folder / "chats.jsonl", hostile=True)
    build_index(make_release(folder, corpus, hostile=True), folder / "index", data=corpus, tokens=2500)
    return folder / "index"


@pytest.fixture(scope="session")
def results(index: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of each kind."""
    return write_results(Index(index), tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="session")
def app(index: Path, results: list[Path]) -> ASGIApp:
    opened = Index(index)
    return make_app(opened, read_results(results, opened))


@pytest.fixture(scope="session")
def site(app: ASGIApp) -> Iterator[str]:
    with serving(app) as address:
        yield address


@pytest.fixture(scope="session")
def exported(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    Notes(index).change("sae_attn", SHARED, note="stays at home", lists={"shared": True})
    out = tmp_path_factory.mktemp("site") / "static"
    export_site(index, out)
    return out


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is missing, and in CI the browser tests must run")
        pytest.skip("chromium is missing (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser, site: str) -> Iterator[Visit]:
    opened = Visit(chromium, site)
    yield opened
    opened.close()
