"""A release's numbers as Parquet: one row per SAE and split, and one per SAE and logged training step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwenscope.errors import FormatError, reason
from qwenscope.files import atomic_path


def write_evaluation(evaluation: Mapping[str, Any], path: Path) -> None:
    """`evaluation.parquet`: sae_id, split, and every plain number of evaluation.json as a column."""
    rows = [
        {"sae_id": sae_id, "split": split, **{key: value for key, value in cell.items() if _plain(value)}}
        for sae_id, splits in evaluation["saes"].items()
        for split, cell in splits.items()
    ]
    _write(rows, path)


def write_training(metrics: Path, path: Path) -> None:
    """`metrics.parquet` from a run's metrics.jsonl: step, tokens, sae_id and that SAE's metrics.

    Raises:
        FormatError: a line of metrics.jsonl is no JSON of metrics.
    """
    _write(list(_training_rows(metrics)), path)


def _training_rows(metrics: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(metrics.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            saes = [(sae_id, dict(values)) for sae_id, values in record.get("saes", {}).items()]
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"{metrics}: line {number} is no line of metrics ({reason(error)}); restore it") from None
        shared = {key: value for key, value in record.items() if _plain(value)}
        for sae_id, values in saes:
            yield shared | {"sae_id": sae_id} | {key: value for key, value in values.items() if _plain(value)}


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, int | float | str)


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = {key: [row.get(key) for row in rows] for key in keys}
    try:
        for key, values in columns.items():  # a column of whole numbers and fractions holds fractions
            if any(isinstance(value, float) for value in values):
                columns[key] = [None if value is None else float(value) for value in values]
        table = pa.table(columns)
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's own errors are of these
        raise FormatError(
            f"{path} cannot be made of numbers like these ({reason(error)}); look at its source"
        ) from None
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
