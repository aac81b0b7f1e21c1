"""The command line: bad input is one line on stderr that names the culprit, its own exit code, and nothing on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwenscope.cli import main


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run the console script's entry point in this process."""

    def run(*words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["qwenscope", *words])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


SMALL = (
    "--set=hook_points={sae: {layer: 1, kind: deltanet, dict_size: 64, k: 4, lr: 1.0e-3}}",
    "--set=training.tokens=2000",
    "--set=training.batch_size=100",
    "--set=training.warmup_steps=2",
    "--set=activations.window_tokens=1000",
    "--set=corpus.max_length=64",
    "--set=corpus.batch_tokens=1024",
)


@pytest.mark.parametrize(
    ("words", "code", "culprit"),
    [
        (["--set=training.tokenz=5"], 3, "training.tokenz"),
        (["--set=hook_points.sae.k=65"], 3, "k 65"),
        (["--set=training.batch_size=1001"], 3, "batch_size 1001"),
        (["--set=hook_points.sae.layer=40"], 4, "sae"),
        (["--set=hook_points.sae.kind=attention"], 4, "sae"),
        (["--set=lm.model=/no/such/model"], 4, "/no/such/model"),
        (["--set=lm.device=nonsense"], 4, "nonsense"),
        (["--set=corpus.sources=[{name: files, path: /no/such.jsonl, weight: 1}]"], 5, "/no/such.jsonl"),
    ],
)
def test_bad_recipes_fail_before_anything_is_written(call, tmp_path: Path, words, code, culprit) -> None:  # type: ignore[no-untyped-def]
    run = tmp_path / "run"
    result = call("train", "standin", "--out", str(run), *SMALL, *words)
    assert (result.code, result.out) == (code, "")
    *before, last = result.err.strip().splitlines()
    assert last.startswith("error: ")
    assert culprit in last
    assert not any("Traceback" in line or "error" in line for line in before)
    assert not (run / "saes").exists()
    if run.exists():  # what failed once it had begun says so
        assert json.loads((run / "status.json").read_text())["state"] == "failed"


def test_an_empty_corpus_is_named(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    sources = f"--set=corpus.sources=[{{name: files, path: {empty}, weight: 1}}]"
    result = call("train", "standin", "--out", str(tmp_path / "run"), *SMALL, sources)
    assert result.code == 5
    assert "empty.jsonl" in result.err
    assert not (tmp_path / "run" / "saes").exists()


def test_missing_recipe_and_wrong_words(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert call("train", "no-such", "--out", str(tmp_path / "run")).code == 3
    assert call("train", "standin").code == 2
    assert call("trian").code == 2
    assert call("export", "x", "--to", "nonsense", "--out", str(tmp_path / "x")).code == 2
    assert not (tmp_path / "run").exists()


def test_debug_keeps_the_traceback(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="no-such"):
        call("train", "no-such", "--out", str(tmp_path / "run"), "--debug")


HELPS = """
import io, sys
from contextlib import redirect_stdout
from qwenscope.cli.main import app, main

def help_of(*command):
    sys.argv[1:] = [*command, "--help"]
    with redirect_stdout(io.StringIO()) as said:
        try:
            main()
        except SystemExit as ending:
            assert not ending.code, command
    slow = {"torch", "transformers", "numpy", "jinja2", "pyarrow"} | ({"pydantic"} if not command else set())
    assert not slow & set(sys.modules), (command, slow & set(sys.modules))
    return said.getvalue()

def walk(group, *words):
    listed = help_of(*words)
    for each in group.registered_commands:
        name = each.name or each.callback.__name__
        assert name in listed
        print(help_of(*words, name))
    for below in group.registered_groups:
        assert below.name in listed
        walk(below.typer_instance, *words, below.name)

walk(app)
"""


def test_help_of_every_command_waits_for_no_room() -> None:
    """torch alone takes seconds."""
    done = subprocess.run([sys.executable, "-c", HELPS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "saelens|sparsify" in done.stdout


def test_doctor_and_data_print_one_json_object(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    report = json.loads(call("doctor", "--json").out)
    assert report["versions"]["torch"]
    dump = tmp_path / "kept.jsonl"
    result = call("data", "standin", "--json", "--limit", "20", "--dump", str(dump), "--set", "corpus.max_length=128")
    survey = json.loads(result.out)
    rows = [json.loads(line) for line in dump.read_text().splitlines()]
    assert len(rows) == 20 == sum(cell["conversations"] for cell in survey["sources"].values())
    assert sum(row["n_tokens"] for row in rows) == survey["tokens"]
    assert set(rows[0]) >= {"source", "messages", "text", "n_tokens"}


def test_help_of_data_lists_the_flags_of_data_recipe(call) -> None:  # type: ignore[no-untyped-def]
    shown = call("data", "--help").out
    assert all(word in shown for word in ("generate", "--limit", "--dump"))


def test_recipe_prints_what_it_reads(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "mine.yaml"
    path.write_text(call("recipe", "standin", "--set", "seed=7").out)
    assert call("recipe", str(path)).out == path.read_text()
    assert "seed: 7" in path.read_text()


def test_recipe_explains_its_keys_without_a_recipe(call) -> None:  # type: ignore[no-untyped-def]
    explained = call("recipe", "--help-keys")
    assert explained.code == 0
    assert "hook_points.<id>.lr" in explained.out
    assert "Adam's decay rates." in explained.out
