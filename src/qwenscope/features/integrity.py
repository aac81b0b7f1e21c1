"""Whether an index is what was written: its files' checksums, its tables, the types of its cells.

Looked at when an index is opened, once for each state (size, time) of its files in this process.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from qwenscope.checksums import CHECKSUMS_FILE, verify_listed
from qwenscope.errors import FormatError

FILE = "index.sqlite"
FILES = (FILE, "latents.parquet", "examples.parquet", "origin.json")
BUSY_SECONDS = 60.0
"""How long a reader waits for a writer's commit, and a writer for readers."""
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE saes (ordinal INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, summary TEXT NOT NULL, latents BLOB NOT NULL);
CREATE TABLE vocabulary (id INTEGER PRIMARY KEY, piece NOT NULL);
CREATE TABLE conversations (
    start INTEGER PRIMARY KEY, id TEXT NOT NULL, source TEXT NOT NULL, split TEXT NOT NULL,
    length INTEGER NOT NULL, tokens BLOB NOT NULL, roles BLOB NOT NULL
);
CREATE TABLE latents (key INTEGER PRIMARY KEY, density REAL NOT NULL, detail BLOB NOT NULL);
CREATE TABLE peaks (token TEXT NOT NULL, share REAL NOT NULL, key INTEGER NOT NULL);
CREATE TABLE explanations (key INTEGER PRIMARY KEY, record TEXT NOT NULL);
CREATE VIRTUAL TABLE search USING fts5 (label, peaks, promoted, context, tokenize = "unicode61 remove_diacritics 2");
"""
PEAKS_BY_TOKEN = "CREATE INDEX peaks_by_token ON peaks (token, share DESC)"
"""Made once `peaks` is full."""
_ODD_CELLS = {
    "meta": "typeof(key) <> 'text' OR typeof(value) <> 'text'",
    "saes": "typeof(id) <> 'text' OR typeof(summary) <> 'text' OR typeof(latents) <> 'blob'",
    "vocabulary": "typeof(piece) NOT IN ('text', 'blob')",
    "conversations": "typeof(id) <> 'text' OR typeof(source) <> 'text' OR typeof(split) <> 'text' "
    "OR typeof(length) <> 'integer' OR length < 1 OR typeof(tokens) <> 'blob' OR typeof(roles) <> 'blob' "
    "OR length(tokens) <> 4 * length OR length(roles) <> length",
    "latents": "typeof(density) <> 'real' OR typeof(detail) <> 'blob'",
    "peaks": "typeof(token) <> 'text' OR typeof(share) <> 'real' OR typeof(key) <> 'integer'",
    "explanations": "typeof(record) <> 'text'",
    "search_content": "typeof(c0) <> 'text' OR typeof(c1) <> 'text' OR typeof(c2) <> 'text' OR typeof(c3) <> 'text'",
}
_verified: dict[Path, object] = {}


def verify_index(folder: Path) -> None:
    """Compare every file of an index with its checksum, and look through its tables.

    An index without `SHA256SUMS` (labels are being written, or it is of an older version) has its pages checked by
    SQLite, which does not see every flipped bit.

    Raises:
        FormatError: a file is damaged, or not of an index; names it.
    """
    state = _state(folder)
    if _verified.get(folder.absolute()) == state:
        return
    verify_listed(folder, [folder / name for name in FILES if (folder / name).exists()])
    try:
        with closing(read_only(folder / FILE)) as database:
            _look_through(database, folder / FILE, pages=not (folder / CHECKSUMS_FILE).exists())
    except sqlite3.DatabaseError as error:
        raise FormatError(f"{folder / FILE} is no index or is damaged ({error}); build it again") from None
    _verified[folder.absolute()] = state


def read_only(path: Path) -> sqlite3.Connection:
    """A connection that writes nothing, and runs no code that the file brings along.

    What a killed writer of labels left half-written is rolled back first, which a connection that only reads cannot.
    """
    if path.with_name(f"{path.name}-journal").exists() and not (path.parent / CHECKSUMS_FILE).exists():
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as writer:
            writer.execute("SELECT name FROM sqlite_master").fetchone()
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)
    database.execute("PRAGMA trusted_schema = OFF")
    return database


def _look_through(database: sqlite3.Connection, path: Path, pages: bool) -> None:
    with closing(sqlite3.connect(":memory:")) as model:
        model.executescript(SCHEMA + PEAKS_BY_TOKEN)
        expected = _tables(model)
    found = _tables(database)
    if odd := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise FormatError(f"{path} is no index of this version or is damaged (table {odd[0]}); build it again")
    if pages and (said := database.execute("PRAGMA integrity_check (1)").fetchone()[0]) != "ok":
        raise FormatError(f"{path} is damaged ({' '.join(said.split())[:200]}); build it again")
    for table, odd_cell in _ODD_CELLS.items():
        if row := database.execute(f"SELECT rowid FROM {table} WHERE {odd_cell} LIMIT 1").fetchone():
            raise FormatError(f"{path} is damaged (row {row[0]} of {table} holds an odd value); build it again")


def _tables(database: sqlite3.Connection) -> dict[str, str]:
    """The statement of each table, index, view and trigger by name."""
    rows = database.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {name: " ".join(str(sql).split()) for name, sql in rows}


def _state(folder: Path) -> list[tuple[str, int, int, int]]:
    found = []
    for name in (CHECKSUMS_FILE, *FILES):
        if (path := folder / name).exists():
            status = path.stat()
            found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
    return found
