"""The examples of docs/features.md run as written, on a suite of random SAEs at the stand-in's hook points."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from qwenscope.features.store import Index, read_explanations
from qwenscope.files import write_text
from qwenscope.recipe import load_recipe
from qwenscope.sae.sae import TopKSAE

NOT_HERE = {"--local", "--endpoint", "--results"}
"""Flags of commands that fetch a model, call one that listens elsewhere, or show what others made: test_label.py and
tests/browser/test_results.py do so."""
TEXT = (Path(__file__).parents[2] / "docs" / "features.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a suite at runs/demo."""
    folder = tmp_path_factory.mktemp("docs")
    recipe = load_recipe("standin")
    (folder / "runs" / "demo").mkdir(parents=True)
    write_text(folder / "runs" / "demo" / "recipe.yaml", recipe.to_yaml())
    for sae_id, point in recipe.hook_points.items():
        sae = TopKSAE(64, point.dict_size, point.k, seed=point.layer)
        sae.config["layer"] = point.layer
        sae.save(folder / "runs" / "demo" / sae_id)
    return folder


def test_the_python_examples_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    scope: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "docs/features.md", "exec"), scope)
    assert len(scope["reading"].tokens) == len(scope["reading"].roles)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_commands_run(folder: Path) -> None:
    for line in "".join(blocks("bash")).splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "qwenscope"
        if NOT_HERE & set(arguments):
            continue
        command = [sys.executable, "-m", "qwenscope", *arguments]
        if arguments[0] == "browse" and "--export" not in arguments:
            with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
                try:
                    assert process.stderr is not None
                    said = process.stderr.readline()
                    assert said.startswith("http://127.0.0.1:8321/"), said
                    assert b"qwenscope" in urllib.request.urlopen(said.split()[0]).read()
                finally:
                    process.terminate()
        else:
            subprocess.run(command, cwd=folder, check=True)
    assert (folder / "site" / "index.html").is_file()
    assert len({sae_id for sae_id, _, _ in read_explanations(Index(folder / "runs" / "demo-index"))}) == 9
