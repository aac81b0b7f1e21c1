"""What several commands share: consoles, options that mean the same everywhere, and how a result is shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Packaged recipe (e.g. standin) or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key: training.tokens=1000000.")
]
TargetName = Annotated[
    str,
    typer.Argument(metavar="TARGET", help="A complete run, a release, imported SAEs, or a Hub repository (org/name)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Data = Annotated[
    Path | None, typer.Option(metavar="PATH", help="Conversations to read instead of the recipe's held-out ones.")
]
Tokens = Annotated[int | None, typer.Option(min=1, help="Tokens per split at most.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]


def show(report: Any, as_json: bool, tables: Callable[[Any], Table | Iterable[Table]]) -> None:
    """A result on stdout, as one JSON object or as tables."""
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        shown = tables(report)
        for table in [shown] if isinstance(shown, Table) else shown:
            out.print(table)


class FormatCommand(TyperCommand):
    """A command with an option `--to` or `--from`: its help names the formats of the registry, which needs torch and is
    therefore asked only then.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            if parameter.name in ("to", "origin"):
                parameter.metavar = "|".join(format_names(parameter.name))
        super().format_help(ctx, formatter)


def format_names(option: str) -> list[str]:
    """The formats SAEs can be written `to`, or of which `origin` they can be read."""
    from qwenscope.sae.formats import EXPORTERS, IMPORTERS

    return list(EXPORTERS if option == "to" else IMPORTERS)


def export_format(text: str) -> str:
    """`text` itself, if SAEs can be written in that format; else typer's usage error."""
    return _known(text, "to")


def import_format(text: str) -> str:
    """`text` itself, if SAEs can be read from that format; else typer's usage error."""
    return _known(text, "origin")


def _known(text: str, option: str) -> str:
    if text not in (names := format_names(option)):
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(names)}")
    return text
