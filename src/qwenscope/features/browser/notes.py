"""Bookmarks and notes: a small SQLite file beside the index, on this machine only; never exported."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from qwenscope.errors import FormatError

FILE = "notes.sqlite"
LIMIT = 4000


class Notes:
    """One note per latent; an empty one without bookmark is none."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def all(self) -> list[dict[str, Any]]:
        """Every note, newest first."""
        if not self._path.exists():
            return []
        with self._connect() as connection:
            rows = connection.execute(
                "SELECT sae, latent, note, bookmarked FROM notes ORDER BY changed DESC"
            ).fetchall()
            odd = "typeof(sae) <> 'text' OR typeof(latent) <> 'integer' OR typeof(note) <> 'text'"
            if connection.execute(f"SELECT 1 FROM notes WHERE {odd} LIMIT 1").fetchone():
                raise FormatError(f"{self._path} is damaged (a note of another kind); remove it")
        return [
            {"sae": sae, "latent": latent, "note": note, "bookmarked": bool(bookmarked)}
            for sae, latent, note, bookmarked in rows
        ]

    def put(self, sae: str, latent: int, note: str, bookmarked: bool) -> None:
        """Replace the note of a latent.

        Raises:
            FormatError: longer than LIMIT characters, or the folder cannot be written.
        """
        if len(note) > LIMIT:
            raise FormatError(f"a note has at most {LIMIT:,} characters, not {len(note):,}")
        with self._connect() as connection, connection:
            if note or bookmarked:
                connection.execute(
                    "INSERT OR REPLACE INTO notes VALUES (?, ?, ?, ?, julianday('now'))",
                    (sae, latent, note, int(bookmarked)),
                )
            else:
                connection.execute("DELETE FROM notes WHERE sae = ? AND latent = ?", (sae, latent))

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path)) as connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS notes (sae TEXT, latent INTEGER, note TEXT, bookmarked INTEGER, "
                    "changed REAL, PRIMARY KEY (sae, latent))"
                )
                yield connection
        except sqlite3.DatabaseError as error:
            raise FormatError(f"notes cannot be kept in {self._path}: {error}") from None
