"""docs/quality.md says what its commands give: its smallest row is run again and compared."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qwenscope.files import read_object

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "quality.md"
KEYS = {"FVU": "fvu", "dead": "dead_fraction", "max cosine": "mean_max_cosine", "recovered": "recovered"}
TOLERANCE = {"fvu": 2e-3, "dead_fraction": 1e-2, "mean_max_cosine": 1e-2, "recovered": 2e-2}
"""What the document states. Between a processor's kernels the row's FVU differs by 3e-8, between seeds by 5e-3."""


def row_named(name: str) -> list[str]:
    """The cells of the table row of docs/quality.md that begins so."""
    found = re.findall(rf"^\| {re.escape(name)} \|.*$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) == 1, f"{DOCUMENT}: {len(found)} rows begin with {name!r}"
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def stated() -> dict[str, float]:
    """{figure: value} of the smallest row; the row above the rule names the columns."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, row = re.findall(r"^\|.*$", text.split("### The smallest row\n", 1)[1], re.MULTILINE)[:3]
    cells = zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (head, row)), strict=True)
    return {
        KEYS[name]: float(cell.removesuffix("%")) / (100 if cell.endswith("%") else 1)
        for name, cell in cells
        if name in KEYS
    }


def test_the_smallest_row_comes_out_as_written(tmp_path: Path) -> None:
    python, script, folder, *arguments = shlex.split(row_named("the smallest row")[1].strip("`"))
    assert (python, script) == ("python", "bench/quality.py")
    subprocess.run([sys.executable, ROOT / script, tmp_path / folder, *arguments], check=True, capture_output=True)
    (trainers,) = read_object(tmp_path / folder / "quality.json")["results"].values()
    written = stated()
    assert written.keys() == TOLERANCE.keys()
    for figure, value in written.items():
        assert trainers["ours"]["tuned"][figure] == pytest.approx(value, abs=TOLERANCE[figure]), figure


def test_every_command_of_the_table_names_a_script_that_is_there() -> None:
    table = DOCUMENT.read_text(encoding="utf-8").split("## Commands\n", 1)[1].split("\n## ", 1)[0]
    scripts = re.findall(r"python (bench/\S+\.py)", table)
    assert len(scripts) > 5
    assert all((ROOT / script).is_file() for script in scripts)
