"""What several commands share: consoles, and the options that mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Packaged recipe (e.g. standin) or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key: training.tokens=1000000.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Data = Annotated[
    Path | None, typer.Option(metavar="PATH", help="Conversations to read instead of the recipe's held-out ones.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
