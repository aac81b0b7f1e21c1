"""README and guides do what they say: Python blocks run in order, commands run or are named with a reason."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from readme_table import FIGURES_FILE, as_text

from qwenscope.files import read_json, write_text
from qwenscope.recipe import HookPoint, load_recipe
from qwenscope.sae.sae import TopKSAE

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md")))}
COMMANDS = "(?:console|bash)"
REAL = "reads the real model or its datasets from the Hub; every step runs on the stand-in"
SMALL = "reads a model and its conversations from the Hub; tests/end_to_end/test_smollm2.py walks the same way"
NOT_RUN = {
    "make demo": "minutes; tests/end_to_end walks the same way",
    "make test": "runs this",
    "pip install -e .": "tests/test_distribution.py installs the package",
    "qwenscope plan qwen3.5-35b-a3b --gpu h200": REAL,
    "qwenscope data qwen3.5-35b-a3b --limit 2000": REAL,
    "qwenscope train qwen3.5-35b-a3b --out runs/35b": REAL,
    "qwenscope train qwen3.5-35b-a3b --out runs/35b --resume": REAL,
    "torchrun --nproc-per-node 8 -m qwenscope train qwen3.5-35b-a3b --out runs/35b-8": REAL,
    "qwenscope train qwen3.5-35b-a3b --out runs/rehearsal --set training.tokens=2000000 "
    "--set training.warmup_steps=50": REAL,
    "qwenscope evaluate runs/35b": REAL,
    "qwenscope release runs/35b --out release --push you/your-saes": REAL,
    "qwenscope train smollm2-135m --out runs/smollm2": SMALL,
    "qwenscope evaluate runs/smollm2 --until-interval 0.05": SMALL,
    "qwenscope index runs/smollm2 --out runs/smollm2-index --tokens 200000": SMALL,
    "qwenscope explain runs/smollm2-index": SMALL,
    "qwenscope steer runs/smollm2 --sae middle --latent 7 --range 'What should I do this weekend?'": SMALL,
    "hf auth login": "asks for a key",
    "qwenscope release runs/demo --out release-pushed --push you/your-saes": "writes to the Hub; tests/release does",
    "qwenscope pull you/your-saes --out copy": "reads what was written there; tests/release does",
}
"""Commands that no test runs as they stand, each with its reason."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[str]:
    """The commands of a document, in order, without their comments."""
    lines = "".join(blocks(path.read_text(encoding="utf-8"), COMMANDS)).splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a complete run at runs/demo: random SAEs at the stand-in's hook points."""
    recipe, run = load_recipe("standin"), tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    write_text(run / "recipe.yaml", recipe.to_yaml())
    write_text(run / "status.json", '{"state": "complete"}')
    for sae_id, point in recipe.hook_points.items():
        sae = TopKSAE(64, point.dict_size, point.k, seed=point.layer)
        sae.config["layer"] = point.layer
        sae.save(run / "saes" / sae_id)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_run_one_after_the_other(name: str, folder: Path) -> None:
    scope: dict[str, object] = {"__name__": name}
    for block in blocks(DOCUMENTS[name].read_text(encoding="utf-8"), "python"):
        exec(compile(block, name, "exec"), scope)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_recipes_in_documents_are_recipes(name: str, folder: Path) -> None:
    for block in blocks(DOCUMENTS[name].read_text(encoding="utf-8"), "yaml"):
        if "lm:" in block:
            write_text(folder / "mine.yaml", block)
            load_recipe(folder / "mine.yaml")
        for point in yaml.safe_load(block)["hook_points"].values():
            HookPoint.model_validate(point)


def test_readme_shows_the_figures_of_the_demo_s_run() -> None:
    assert f"```\n{as_text(read_json(FIGURES_FILE))}```" in DOCUMENTS["README.md"].read_text(encoding="utf-8")


def test_what_is_not_run_is_still_written_somewhere() -> None:
    written = {command for path in DOCUMENTS.values() for command in commands(path)}
    assert set(NOT_RUN) <= written


Names = dict[str, tuple[list[str], dict[str, bool]]]


def public_names() -> Names:
    """{class or module: (its bases, {public function, class or method defined there: whether it has a docstring})}."""
    found: Names = {}

    def look(name: str, node: ast.Module | ast.ClassDef) -> None:
        bases = [ast.unparse(base).partition("[")[0] for base in getattr(node, "bases", [])]
        defined = found.setdefault(name, (bases, {}))[1]
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name[0] != "_":
                defined[child.name] = ast.get_docstring(child) is not None
                if isinstance(child, ast.ClassDef):
                    look(child.name, child)

    for path in sorted((ROOT / "src").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        look(str(path.relative_to(ROOT)), tree)
    return found


def test_every_public_name_has_a_docstring_or_overrides_one_that_has() -> None:
    names = public_names()

    def documented(owner: str, name: str) -> bool:
        bases, defined = names.get(owner, ([], {}))
        return defined.get(name, False) or any(documented(base, name) for base in bases)

    missing = [
        (owner, name) for owner, (_, defined) in names.items() for name in defined if not documented(owner, name)
    ]
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_run(name: str, folder: Path) -> None:
    text = DOCUMENTS[name].read_text(encoding="utf-8")
    for block in blocks(text, "yaml"):
        write_text(folder / "mine.yaml", block)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for command in commands(DOCUMENTS[name]):
        if command in NOT_RUN:
            continue
        program, *arguments = shlex.split(command)
        assert program == "qwenscope", f"{command}: neither run nor named with a reason"
        started = [sys.executable, "-m", "qwenscope", *arguments]
        if arguments[0] == "browse":
            with subprocess.Popen([*started, "--port", "0"], stderr=subprocess.PIPE, text=True) as process:
                try:
                    assert process.stderr is not None
                    address = process.stderr.readline().split()[0]
                    assert b"qwenscope" in urllib.request.urlopen(address).read()
                finally:
                    process.terminate()
        else:
            done = subprocess.run(started, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
