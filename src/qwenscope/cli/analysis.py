"""The commands that contrast piles of conversations and watch for a behavior; `main.py` registers them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qwenscope.cli.options import AsJson, TargetName, err, show
from qwenscope.cli.progress import phases
from qwenscope.cli.tables import contrast_tables


class Pooling(StrEnum):
    """How a conversation's tokens become one number per latent."""

    max = "max"
    mean = "mean"


Saes = Annotated[list[str], typer.Option("--sae", metavar="ID", help="SAE to look at; repeat it. All by default.")]
PoolBy = Annotated[Pooling, typer.Option("--pool", help="Largest or mean activation over a conversation's tokens.")]
Roles = Annotated[
    str | None, typer.Option(metavar="ROLE,...", help="Tokens of these roles alone, such as assistant,tool_call.")
]
Positions = Annotated[
    str | None, typer.Option(metavar="A:B", help="Of these tokens those from A to B, as in Python: :50, -20: .")
]
Positive = Annotated[Path | None, typer.Option(metavar="PATH", help="Conversations with the behavior.")]
Negative = Annotated[Path | None, typer.Option(metavar="PATH", help="Conversations without it.")]
Labelled = Annotated[Path | None, typer.Option(metavar="PATH", help="One place for both, with --label.")]
Label = Annotated[
    str | None, typer.Option(metavar="KEY=VALUE", help="With --data: rows with this value are positive, others not.")
]
Pairs = Annotated[Path | None, typer.Option(metavar="PATH", help="Rows with `positive` and `negative` messages.")]
Example = Annotated[
    str | None, typer.Option(metavar="NAME", help="Packaged pairs: an agentic behavior, such as asks-before-acting.")
]


def contrast(
    target: TargetName,
    positive: Positive = None,
    negative: Negative = None,
    data: Labelled = None,
    label: Label = None,
    pairs: Pairs = None,
    example: Example = None,
    sae: Saes = [],  # noqa: B006 - typer copies it
    pool: PoolBy = Pooling.max,
    roles: Roles = None,
    positions: Positions = None,
    path: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for contrast.json and steering.json.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Which latents go with a behavior: effects, permutation tests, and the controls that show if the SAE adds any."""
    from qwenscope.analysis.contrast import contrast as run_contrast
    from qwenscope.analysis.pooling import Scope

    piles = {"positive": positive, "negative": negative, "data": data, "label": label}
    with phases(err) as on_progress:
        result = run_contrast(
            target,
            out=path,
            saes=sae,
            pool=pool.value,
            scope=Scope.of(roles, positions),
            on_progress=on_progress,
            **piles,
            pairs=pairs,
            example=example,
        )
    show(result, as_json, contrast_tables)
    if path is not None:
        err.print(f"wrote {path}", highlight=False, markup=False)
