"""The commands that contrast piles of conversations and watch for a behavior; `main.py` registers them."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from qwenscope.cli.options import AsJson, Data, Out, TargetName, err, show, write_json
from qwenscope.cli.progress import phases
from qwenscope.cli.tables import contrast_tables, diff_tables, monitor_table, monitor_test_tables
from qwenscope.cli.trace_tables import trace_tables
from qwenscope.errors import FormatError


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


def diff(
    target: TargetName,
    a: Annotated[Path | None, typer.Option("--a", metavar="PATH", help="Conversations or documents.")] = None,
    b: Annotated[Path | None, typer.Option("--b", metavar="PATH", help="Others.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="PATH", help="What both models read, with --model-b.")] = None,
    model_b: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another checkpoint: a folder or Hub id; a is the target's own.")
    ] = None,
    sae: Saes = [],  # noqa: B006 - typer copies it
    roles: Roles = None,
    positions: Positions = None,
    path: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Also write the result as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which latents fire more in one corpus than in another, or under one checkpoint than under another."""
    from qwenscope.analysis.checkpoints import diff_checkpoints
    from qwenscope.analysis.diff import diff as diff_corpora
    from qwenscope.analysis.pooling import Scope

    chosen: dict[str, Any] = {"out": path, "saes": sae, "scope": Scope.of(roles, positions)}
    with phases(err) as on_progress:
        chosen["on_progress"] = on_progress
        if a is not None and b is not None and data is None and model_b is None:
            result = diff_corpora(target, a=a, b=b, **chosen)
        elif data is not None and model_b is not None and a is None and b is None:
            result = diff_checkpoints(target, data=data, model_b=model_b, **chosen)
        else:
            raise FormatError("name two corpora with --a and --b, or one and a checkpoint with --data and --model-b")
    show(result, as_json, diff_tables)


def trace(
    target: TargetName,
    sae: Annotated[str, typer.Option(metavar="ID", help="SAE of the latent.")],
    latent: Annotated[int, typer.Option(min=0, help="Which of its latents.")],
    strength: Annotated[float, typer.Option(help="How far is pushed along it, in norms of the row.")] = 0.3,
    data: Data = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read of each split at most.")] = 5_000,
    path: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Also write the result as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Where a latent acts: at prefill or decode, on which experts, on the recurrent states above; beside controls."""
    from qwenscope.analysis.trace import trace as trace_latent

    with phases(err) as on_progress:
        result = trace_latent(
            target,
            sae=sae,
            latent=latent,
            strength=strength,
            data=data,
            tokens=tokens,
            out=path,
            on_progress=on_progress,
        )
    show(result, as_json, trace_tables)
    if path is not None:
        err.print(f"wrote {path}", highlight=False, markup=False)


monitor = typer.Typer(
    no_args_is_help=True, help="A detector for a behavior: fit it, test it on other piles, score conversations."
)
MonitorFolder = Annotated[Path, typer.Argument(metavar="MONITOR", help="Folder that `monitor fit` wrote.")]


@monitor.command()
def fit(
    target: TargetName,
    path: Out,
    fpr: Annotated[float, typer.Option(help="False-positive rate that the threshold is for.")] = 0.01,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Conversations without the behavior; else half of the negatives."),
    ] = None,
    positive: Positive = None,
    negative: Negative = None,
    data: Labelled = None,
    label: Label = None,
    pairs: Pairs = None,
    example: Example = None,
    sae: Annotated[str | None, typer.Option(metavar="ID", help="SAE; by default the one that does best.")] = None,
    latent: Annotated[
        list[int], typer.Option(min=0, help="Use this latent of --sae; repeat it. By default a sparse probe chooses.")
    ] = [],  # noqa: B006 - typer copies it
    pool: PoolBy = Pooling.max,
    roles: Roles = None,
    positions: Positions = None,
    as_json: AsJson = False,
) -> None:
    """Fit a monitor with a threshold at a stated false-positive rate; refuses where the pile is too small for it."""
    from qwenscope.analysis import monitor as room
    from qwenscope.analysis.pooling import Scope

    piles = {"positive": positive, "negative": negative, "data": data, "label": label}
    with phases(err) as on_progress:
        result = room.fit(
            target,
            path,
            fpr=fpr,
            calibration=calibration,
            sae=sae,
            latents=latent,
            pool=pool.value,
            scope=Scope.of(roles, positions),
            on_progress=on_progress,
            **piles,
            pairs=pairs,
            example=example,
        )
    show(result, as_json, monitor_table)
    err.print(f"wrote {path}", highlight=False, markup=False)


@monitor.command("test")
def measure(
    target: TargetName,
    folder: MonitorFolder,
    positive: Positive = None,
    negative: Negative = None,
    data: Labelled = None,
    label: Label = None,
    pairs: Pairs = None,
    example: Example = None,
    path: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Also write the result as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """AUROC, recall at 1 % and 0.1 %, and whether the stated rate holds, beside controls, on piles not seen before."""
    from qwenscope.analysis import monitor as room

    piles = {"positive": positive, "negative": negative, "data": data, "label": label}
    with phases(err) as on_progress:
        result = room.measure(target, folder, out=path, on_progress=on_progress, **piles, pairs=pairs, example=example)
    show(result, as_json, monitor_test_tables)


@monitor.command()
def score(
    target: TargetName,
    folder: MonitorFolder,
    data: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="Conversations; JSONL on stdin by default.")
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Also the score of every token, and of all up to it.")
    ] = False,
) -> None:
    """Score conversations, one JSON object a line: as a whole and turn by turn, with an alarm above the threshold."""
    from qwenscope.analysis import monitor as room
    from qwenscope.corpus.given import rows_of, rows_of_lines

    rows = rows_of_lines(sys.stdin, "stdin") if data is None else rows_of(data)
    for scored in room.score(target, folder, rows):
        write_json(scored.line(tokens=tokens), indent=None)
