"""`bench/card.sh --dry`: the walk that a card is to be asked for, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def walk(out: Path, *phases: str) -> tuple[int, list[dict[str, object]]]:
    """(exit code, DIR/phases.json) of a dry run."""
    command = ["bash", "bench/card.sh", "--dry", "--out", str(out), *phases]
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}).returncode
    return code, json.loads((out / "phases.json").read_text())


def test_phases_leave_json_and_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "doctor.json").mkdir()  # so that it cannot be written
    code, phases = walk(tmp_path, "doctor", "step")
    assert code == 1
    assert [phase["phase"] for phase in phases] == ["doctor", "step"]
    assert phases[0]["exit_code"] != 0
    assert phases[1]["exit_code"] == 0, (tmp_path / "step.log").read_text()


def test_the_whole_walk(tmp_path: Path) -> None:
    code, phases = walk(tmp_path)
    assert code == 0, phases
    assert len(phases) == 6
    kernels = json.loads((tmp_path / "kernels.json").read_text())
    assert max(kernel["error"] for kernel in kernels["256/8"].values()) < 1e-3
    assert len(kernels["256/8"]) == 7
    assert json.loads((tmp_path / "fullsize.json").read_text())["tokens_per_s_overlapped"] > 0
    assert json.loads((tmp_path / "resume.json").read_text())["self_test"]["identical"]
