"""What several commands share: consoles, options that mean the same everywhere, and how a result is shown."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from qwenscope.errors import FormatError

if TYPE_CHECKING:
    from qwenscope.recipe import Recipe

T = TypeVar("T")
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal would obey instead of showing it: control characters but line ends and tabs, turns of the writing
direction; and lone surrogates, which no encoding has."""


def visible(text: str) -> str:
    """`text` with an escape in place of each character that a terminal would obey."""
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class _Console(Console):
    """Shows what it is given: texts of corpora, models, labels and names move no cursor and change no color."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


out = _Console(soft_wrap=True, emoji=False)
err = _Console(stderr=True, soft_wrap=True, emoji=False)


def set_up_output(debug: bool) -> None:
    """Log to stderr, and write escapes for what an output's encoding lacks (a pipe's may be ASCII).

    Warnings of other libraries are for their developers: they are shown with --debug, or where Python's -W asks.
    """
    if not debug and not sys.warnoptions:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))


def write_json(value: Any, indent: int | None = 2) -> None:
    """One JSON object on stdout, in any encoding; without `indent` on one line."""
    plain = not sys.stdout.encoding.lower().startswith("utf")
    text = json.dumps(value, indent=indent, ensure_ascii=plain, allow_nan=False)
    sys.stdout.write(_UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")


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


def read_recipe(name: str, overrides: list[str] | None) -> Recipe:
    """A recipe that is to be used on this machine.

    Raises:
        RecipeError: what `load_recipe` refuses, or a cache that cannot be reached from here.
    """
    from qwenscope.recipe import load_recipe

    recipe = load_recipe(name, overrides or ())
    if recipe.activations.cache is not None:
        from qwenscope.limits import check_cache  # with torch, which takes seconds

        check_cache(recipe)
    return recipe


def show(report: Any, as_json: bool, tables: Callable[[Any], Table | Iterable[Table]]) -> None:
    """A result on stdout, as one JSON object or as tables."""
    if as_json:
        write_json(report)
    else:
        shown = tables(report)
        for table in [shown] if isinstance(shown, Table) else shown:
            out.print(table)


def per_latent(option: str, values: list[T], latents: list[int]) -> list[T]:
    """One value per latent: all given, or one for all."""
    if len(values) not in (1, len(latents)):
        raise FormatError(f"{option} is given {len(values)} times, --latent {len(latents)}; give it once, or as often")
    return values * len(latents) if len(values) == 1 else values
