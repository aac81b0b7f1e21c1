"""README's table, from the run that `make demo` left: its figures into bench/results/demo.json, the text into README.

python bench/readme_table.py runs/demo
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from qwenscope.cli.tables import COLUMNS, evaluation_table
from qwenscope.files import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
README, FIGURES_FILE = ROOT / "README.md", ROOT / "bench" / "results" / "demo.json"
BLOCK = re.compile(r"(?<=```\n)Held-out evaluation\n.*?(?=```)", re.DOTALL)


def of_the_table(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What an `evaluation.json` object says in the table, and where that was measured."""
    figures = {
        sae_id: {split: {key: cell[key] for key, _, _ in COLUMNS} for split, cell in splits.items()}
        for sae_id, splits in evaluation["saes"].items()
    }
    return {key: evaluation[key] for key in ("qwenscope", "language_model", "data")} | {"saes": figures}


def as_text(figures: Mapping[str, Any]) -> str:
    """The table as the terminal shows it, without the blanks at line ends."""
    page = Console(file=io.StringIO(), width=120)
    page.print(evaluation_table(figures))
    assert isinstance(page.file, io.StringIO)
    return "".join(f"{line.rstrip()}\n" for line in page.file.getvalue().splitlines())


def main() -> None:
    write_json(FIGURES_FILE, of_the_table(read_json(Path(sys.argv[1]) / "evaluation.json")))
    text = as_text(read_json(FIGURES_FILE))
    write_text(README, BLOCK.sub(lambda _: text, README.read_text(encoding="utf-8"), count=1))


if __name__ == "__main__":
    main()
