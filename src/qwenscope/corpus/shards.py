"""Reading one shard, parquet or JSON lines, from any row on.

A shard is opened by a function, so that the same code reads a local file and a stream from the Hub. Rows come as
(index, row) pairs; the index counts rows in reading order and is what a cursor keeps.
"""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwenscope.corpus.repair import parse_json
from qwenscope.errors import CorpusError, reason
from qwenscope.hub import retrying

CHUNK_ROWS = 128
"""Rows that are read, filtered, rendered and tokenised together: enough that the tokenizer's tables stay in cache."""
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")

WILDCHAT_ROW = frozenset({"country", "redacted", "toxic"})
WILDCHAT_TURN = frozenset({"content", "role", "country", "redacted", "toxic"})
"""All that is ever read of WildChat: addresses, headers and states never reach memory from parquet."""

Rows = list[tuple[int, Any]]
Columns = Mapping[str, str] | None
"""{messages, tools or text: what the files call it}; None for WildChat's own. Rows leave here under our names."""

_MOST_BYTES = 1 << 24  # of a line: more than the longest conversation that is kept


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands in for a line that is not JSON or too long to be read; it is counted as a drop."""

    reason: str


@dataclass(frozen=True)
class Shard:
    """One file of a source."""

    name: str
    """Path inside the folder or repository; errors and the order's seed use it."""
    open: Callable[[], IO[bytes]]
    """A fresh handle at the file's start."""


def read_shard(shard: Shard, row: int, columns: Columns, seed: int, where: str) -> Iterator[Rows]:
    """Rows from index `row` to the end, in chunks of at most CHUNK_ROWS.

    Args:
        shard: the file.
        row: index of the first row wanted.
        columns: what is read.
        seed: order of a parquet file's row groups; JSON lines stay in file order.
        where: the source in words, for errors.

    Raises:
        CorpusError: unreadable, truncated, or without any of the columns; names the shard.
    """
    reader = _parquet if shard.name.endswith(".parquet") else _jsonl
    try:
        yield from reader(shard, row, columns, seed, f"{where}: {shard.name}")
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise _unreadable(shard, where, error) from error


def count_rows(shard: Shard, where: str) -> int:
    """Row indices that `read_shard` counts through: rows of a parquet file, lines (blank ones too) of JSON lines.

    Raises:
        CorpusError: unreadable or truncated; names the shard.
    """
    try:
        if shard.name.endswith(".parquet"):
            with closing(_ParquetShard(shard)) as file:
                rows: int = retrying(file.metadata, where).num_rows
                return rows
        with closing(retrying(shard.open, where)) as raw:
            return sum(1 for _ in _lines(shard, raw))
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise _unreadable(shard, where, error) from error


class _ParquetShard:
    """A parquet file that is opened when first needed, and afresh after a failure."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._handle: IO[bytes] | None = None
        self._file: pq.ParquetFile | None = None

    def metadata(self) -> pq.FileMetaData:
        return self._opened().metadata

    def row_group(self, number: int, columns: list[str]) -> pa.Table:
        try:
            return self._opened().read_row_group(number, columns=columns)
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
        self._handle = self._file = None

    def _opened(self) -> pq.ParquetFile:
        if self._file is None:
            self._handle = self._shard.open()
            self._file = pq.ParquetFile(self._handle, pre_buffer=True)
        return self._file


def _parquet(shard: Shard, row: int, columns: Columns, seed: int, where: str) -> Iterator[Rows]:
    with closing(_ParquetShard(shard)) as file:
        metadata = retrying(file.metadata, where)
        leaves = _leaves(metadata, columns, where)
        order = list(range(metadata.num_row_groups))
        random.Random(seed).shuffle(order)
        start = 0
        for number in order:
            size = metadata.row_group(number).num_rows
            if row < start + size:
                table = retrying(partial(file.row_group, number, leaves), where)
                for offset in range(max(row - start, 0), size, CHUNK_ROWS):
                    rows = table.slice(offset, CHUNK_ROWS).to_pylist()
                    yield [(start + offset + i, _named(_without_nulls(item), columns)) for i, item in enumerate(rows)]
            start += size


def _leaves(metadata: pq.FileMetaData, columns: Columns, where: str) -> list[str]:
    """Leaf columns to read; missing ones are an error."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    if columns is not None:
        _check_columns({path.partition(".")[0] for path in paths}, columns, where)
        return [path for path in paths if path.partition(".")[0] in columns.values()]
    turns = [path for path in paths if path.startswith("conversation.") and path.count(".") == 3]
    turn = {path: path.rpartition(".")[2] for path in turns}
    leaves = [path for path, leaf in turn.items() if leaf in WILDCHAT_TURN]
    leaves += [path for path in paths if path in WILDCHAT_ROW]
    missing = (WILDCHAT_TURN - set(turn.values())) | (WILDCHAT_ROW - set(paths))
    if missing:
        raise CorpusError(f"{where} has no column {', '.join(sorted(missing))}; it is not of the wildchat schema")
    return leaves


def _check_columns(found: Collection[str], columns: Mapping[str, str], where: str) -> None:
    """CorpusError unless there are messages or texts under the names that they should have."""
    wanted = [name for meaning, name in columns.items() if meaning != "tools"]
    if not set(wanted) & set(found):
        shown = ", ".join(sorted(found)[:20]) or "none"
        raise CorpusError(
            f"{where} has no column {' or '.join(wanted)}; its columns are {shown[:300]}: name the one that holds the "
            "documents with the source's key text, or the conversations with messages"
        )


def _named(row: Any, columns: Columns) -> Any:
    """A row under our names for its columns."""
    if columns is None or not isinstance(row, dict):
        return row
    return {meaning: row[name] for meaning, name in columns.items() if name in row}


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct of a column the union of all keys and fills them with nulls: those were never there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _jsonl(shard: Shard, row: int, columns: Columns, seed: int, where: str) -> Iterator[Rows]:
    del seed
    with closing(retrying(shard.open, where)) as raw:
        rows: Rows = []
        checked = columns is None
        for index, line in enumerate(_lines(shard, raw)):
            if index >= row and (line is None or line.strip()):
                rows.append((index, _item(line, f"{where} ends in the middle of line {index + 1}")))
            if len(rows) == CHUNK_ROWS:
                checked = checked or _check_rows(rows, columns, where)
                yield [(number, _named(item, columns)) for number, item in rows]
                rows = []
        if rows:
            checked = checked or _check_rows(rows, columns, where)
            yield [(number, _named(item, columns)) for number, item in rows]


def _check_rows(rows: Rows, columns: Columns, where: str) -> bool:
    """Whether there were columns to check among the rows, of which one at least should have a wanted one."""
    found = {name for _, row in rows if isinstance(row, dict) for name in row}
    if found and columns is not None:
        _check_columns(found, columns, where)
    return bool(found)


def _item(line: bytes | None, cut: str) -> Any:
    if line is None:
        return Malformed("too_long")
    try:
        return parse_json(line)
    except ValueError as error:
        if not line.endswith(b"\n"):
            raise CorpusError(f"{cut}; fetch it again") from error
        return Malformed("malformed_row")


def _lines(shard: Shard, raw: IO[bytes]) -> Iterator[bytes | None]:
    """Line by line; None for one that is too long."""
    file: Any = gzip.GzipFile(fileobj=raw) if shard.name.endswith(".gz") else raw
    while line := file.readline(_MOST_BYTES):
        too_long = False
        while len(line) == _MOST_BYTES and not line.endswith(b"\n"):
            too_long, line = True, file.readline(_MOST_BYTES)
        yield None if too_long else line


def _unreadable(shard: Shard, where: str, error: BaseException) -> CorpusError:
    return CorpusError(f"{where}: {shard.name} cannot be read ({reason(error)}); restore the file")
