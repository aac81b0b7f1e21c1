"""Turn the result of bench/quality.py into Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = {
    "explained_variance": ("EV", "{:.4f}"),
    "dead_fraction": ("dead", "{:.1%}"),
    "ce_recovered_mean": ("CE recovered", "{:.4f}"),
    "kl": ("KL", "{:.3f}"),
    "mean_max_cosine": ("max cosine", "{:.3f}"),
    "recovered": ("recovered", "{:.3f}"),
    "matched_f1": ("F1", "{:.3f}"),
    "stable": ("stable", "{:.3f}"),
    "cpu_seconds": ("CPU s", "{:.0f}"),
}


def markdown(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """One table per set of rows: each trainer at its best rate and at its defaults."""
    tables = []
    for data, trainers in results.items():
        first = next(iter(trainers.values()))["tuned"]
        columns = {key: column for key, column in COLUMNS.items() if key in first}
        head = ["trainer", "lr", "FVU ± spread", *(name for name, _ in columns.values())]
        lines = [f"### {data}", "", _line(head), _line(["---"] * len(head))]
        for name, found in trainers.items():
            lines += [
                _line([name, _rate(found[kind]), _fvu(found[kind]), *_cells(found[kind], columns)])
                for kind in ("tuned", "default")
                if kind in found
            ]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rate(found: Mapping[str, float]) -> str:
    return f"{found['lr']:g}" if "lr" in found else "default"


def _fvu(found: Mapping[str, float]) -> str:
    return f"{found['fvu']:.4f} ± {found['fvu_spread'] / 2:.4f}"


def _cells(found: Mapping[str, float], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    return [style.format(found[key]) for key, (_, style) in columns.items()]
