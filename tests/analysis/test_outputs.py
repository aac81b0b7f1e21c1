"""One process writes one result: the other is told so before it has done any work."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwenscope.cli.main import app
from qwenscope.errors import FormatError, LockError
from qwenscope.training.lock import sole_writer

COMMANDS: dict[str, list[str]] = {
    "contrast": ["contrast", "nowhere", "--example", "asks-before-acting"],
    "diff": ["diff", "nowhere", "--a", "a.jsonl", "--b", "b.jsonl"],
    "checkpoints": ["diff", "nowhere", "--data", "a.jsonl", "--model-b", "other"],
    "trace": ["trace", "nowhere", "--sae", "one", "--latent", "0"],
    "monitor fit": ["monitor", "fit", "nowhere", "--example", "asks-before-acting"],
    "monitor test": ["monitor", "test", "nowhere", "monitor", "--example", "asks-before-acting"],
    "scenarios": ["steer", "nowhere", "--scenarios", "scenarios.yaml"],
}
SCENARIOS = """
traits: {asks: {sae: sae, latent: 0, check: asks}}
checks: {asks: {asks: true}}
scenarios: [{name: one, messages: [{role: user, content: order}]}]
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_session_with_the_same_out_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scenarios.yaml").write_text(SCENARIOS)
    with (
        sole_writer(Path("out")),
        pytest.raises(LockError, match=f"^out is in use by process {os.getpid()} on .*; stop that one first"),
    ):
        CliRunner().invoke(app, [*COMMANDS[command], "--out", "out"], catch_exceptions=False)
    assert {path.name for path in tmp_path.iterdir()} == {"scenarios.yaml"}


@pytest.mark.parametrize("command", ["contrast", "monitor fit"])
def test_a_folder_that_holds_something_is_refused_before_any_work(command: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(FormatError, match="is not empty"):
        CliRunner().invoke(app, [*COMMANDS[command], "--out", str(tmp_path)], catch_exceptions=False)


def test_whoever_comes_as_a_lock_goes_is_alone_or_refused(tmp_path: Path) -> None:
    """Its file is removed with it, so that two may hold files of the same name."""
    inside: list[int] = []
    seen: list[Any] = []

    def come_and_go(mine: int) -> None:
        for _ in range(100):
            try:
                with sole_writer(tmp_path / "new" / "out.json"):
                    inside.append(mine)
                    seen.append(list(inside))
                    inside.remove(mine)
            except LockError:
                pass
            except Exception as error:
                seen.append(error)

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(held, list) and len(held) == 1 for held in seen)
    assert list((tmp_path / "new").iterdir()) == []
