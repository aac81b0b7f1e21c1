"""The files of a folder are mixed row by row, evenly, each row once, and from any row on."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenscope.corpus import mixing
from qwenscope.corpus.mixing import mixed_order
from qwenscope.corpus.sources import Chunk, Source, open_source
from qwenscope.errors import CorpusError
from qwenscope.recipe import SourceRecipe

SIZES = {"chat.parquet": 300, "tools.jsonl": 60, "more/tools.jsonl.gz": 240, "one.jsonl": 1}


def row_of(name: str, number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"{name} {number}"}]}


def write_folder(root: Path, sizes: dict[str, int]) -> Path:
    for name, count in sizes.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row_of(name, number) for number in range(count)]
        lines = "".join(json.dumps(row) + "\n" + "\n" * (number % 7 == 3) for number, row in enumerate(rows)).encode()
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
        else:
            path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    return root


def open_folder(root: Path, seed: int = 5) -> Source:
    return open_source(SourceRecipe(name="files", path=root, weight=1.0), "files", seed, False, None)


def flat(chunks: list[Chunk]) -> list[tuple[int, int, str]]:
    return [(chunk.shard, index, row["messages"][0]["content"]) for chunk in chunks for index, row in chunk.rows]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(0, 2**32))
def test_after_any_share_of_the_whole_each_file_has_given_its_share(counts: list[int], seed: int) -> None:
    order = list(mixed_order(counts, seed))
    assert Counter(order) == Counter({number: count for number, count in enumerate(counts) if count})
    given_so_far = [0] * len(counts)
    for done, number in enumerate(order, start=1):
        given_so_far[number] += 1
        for had, count in zip(given_so_far, counts, strict=True):
            assert abs(had - count * done / len(order)) <= len(counts)


def test_every_row_once_and_each_file_all_along(tmp_path: Path) -> None:
    names = [text.split()[0] for _, _, text in flat(list(open_folder(write_folder(tmp_path, SIZES)).chunks(0, 0)))]
    texts = [text for _, _, text in flat(list(open_folder(tmp_path).chunks(0, 0)))]
    assert sorted(texts) == sorted(f"{name} {number}" for name, count in SIZES.items() for number in range(count))
    for start in range(0, 600, 60):
        seen = Counter(names[start : start + 60])
        assert 25 <= seen["chat.parquet"] <= 35
        assert 4 <= seen["tools.jsonl"] <= 8
        assert 19 <= seen["more/tools.jsonl.gz"] <= 29


@pytest.mark.parametrize("together", [2, 16])
def test_from_any_row_on_the_rest_is_the_same(tmp_path: Path, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenscope.corpus.sources.MIXED_SHARDS", together)
    monkeypatch.setattr(mixing, "CHUNK_ROWS", 32)
    source = open_folder(write_folder(tmp_path, SIZES))
    whole = flat(list(source.chunks(0, 0)))
    assert len({group for group, _, _ in whole}) == (2 if together == 2 else 1)
    for begin in (1, 31, 32, 257, len(whole) - 1):
        group, index, _ = whole[begin]
        assert flat(list(source.chunks(group, index))) == whole[begin:]


def test_the_seed_governs_the_order_and_nothing_else(tmp_path: Path) -> None:
    write_folder(tmp_path, SIZES)
    first, again, other = (flat(list(open_folder(tmp_path, seed).chunks(0, 0))) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert sorted(text for *_, text in first) == sorted(text for *_, text in other)


def test_a_damaged_file_among_others_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, SIZES)
    packed = tmp_path / "more/tools.jsonl.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"more/tools\.jsonl\.gz cannot be read .*restore the file"):
        list(open_folder(tmp_path).chunks(0, 0))
