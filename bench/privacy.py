"""Throughput of the privacy scrub on one core, by file and in all.

    python bench/privacy.py PATH...

PATHs are files or folders of conversations (.parquet, .jsonl, .jsonl.gz; `messages`, perhaps `tools`). Prints one JSON
object: MB of text (UTF-8, every string of a row) per second of CPU time, the best of three rounds, each in a fresh
process, so that no round finds what an earlier one cached; and how many identifiers were found.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from qwenscope.corpus.privacy import PrivacyFilter
from qwenscope.recipe import PrivacyRecipe

WARM_UP = 20  # rows
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+")
    given: list[Path] = parser.parse_args().paths
    files = [path for one in given for path in (sorted(one.rglob("*.*")) if one.is_dir() else [one])]
    result: dict[str, Any] = {"files": {}}
    total, seconds = 0, 0.0
    for path in files:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            rounds = [pool.submit(scrub, path).result() for _ in range(ROUNDS)]
        size, took, found = min(rounds, key=lambda one: one[1])
        result["files"][path.name] = {
            "mb": round(size / 1e6, 2),
            "mb_per_s": round(size / 1e6 / took, 2),
            "found": found,
        }
        total, seconds = total + size, seconds + took
    result["mb_per_s"] = round(total / 1e6 / seconds, 2)
    print(json.dumps(result, indent=1))


def scrub(path: Path) -> tuple[int, float, int]:
    """Bytes of text in a file's rows, CPU seconds to scrub them, and identifiers found."""
    rows = list(rows_of(path))
    privacy = PrivacyFilter(PrivacyRecipe())
    for row in rows[-WARM_UP:]:
        privacy.scrub_all(row)
    start = time.process_time()
    found = sum(sum(privacy.scrub_all(row)[1].values()) for row in rows)
    return sum(map(size_of, rows)), time.process_time() - start, found


def rows_of(path: Path) -> Iterator[Any]:
    """`messages` and `tools` of each row."""
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    else:
        raw = path.read_bytes()
        rows = [json.loads(line) for line in (gzip.decompress(raw) if path.suffix == ".gz" else raw).splitlines()]
    for row in rows:
        yield [row["messages"], row.get("tools") or []]


def size_of(value: Any) -> int:
    """Bytes of all strings in a JSON value."""
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    if isinstance(value, dict):
        return sum(size_of(part) for pair in value.items() for part in pair)
    return sum(map(size_of, value)) if isinstance(value, list) else 0


if __name__ == "__main__":
    main()
