"""Notes, bookmarks and named lists of latents: a small SQLite file beside the index, on this machine only.

Several pages may write at once: each sends what changed there and which note it had seen, SQLite lets one write after
the other, and who has not seen the note that stands there by now is told it instead of replacing it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from qwenscope.errors import FormatError
from qwenscope.features.store import Index

FILE = "notes.sqlite"
LIMIT = 4000
LIST_LIMIT = 100
"""Characters of a note, and of a list's name."""
WRITE_SECONDS = 60.0
"""How long a writer waits for others."""
_TABLES = (
    "CREATE TABLE IF NOT EXISTS notes (sae TEXT, latent INTEGER, note TEXT, bookmarked INTEGER, "
    "changed REAL, PRIMARY KEY (sae, latent))",
    "CREATE TABLE IF NOT EXISTS listed (list TEXT, sae TEXT, latent INTEGER, PRIMARY KEY (list, sae, latent))",
)
_ODD = (
    "SELECT 1 FROM notes WHERE typeof(sae) <> 'text' OR typeof(latent) <> 'integer' OR typeof(note) <> 'text' "
    "UNION ALL SELECT 1 FROM listed "
    "WHERE typeof(list) <> 'text' OR typeof(sae) <> 'text' OR typeof(latent) <> 'integer' LIMIT 1"
)


@with_config(ConfigDict(extra="forbid", strict=True))
class NoteChange(TypedDict, total=False):
    """What is to be changed of what is kept of a latent: see `Notes.change`."""

    note: str
    was: str
    bookmarked: bool
    lists: dict[str, bool]


_CHANGE = TypeAdapter(NoteChange)


def checked_change(asked: dict[str, Any]) -> NoteChange:
    """`asked` itself; FormatError if it is no change of a note."""
    try:
        return _CHANGE.validate_python(asked)
    except ValidationError:
        said = "{note: text, was: text, bookmarked: true or false, lists: {name: true or false}}"
        raise FormatError(f"a change of a note is {said}, or some of these") from None


class ChangedNoteError(FormatError):
    """Another note stands there than its writer had seen."""

    def __init__(self, note: str) -> None:
        super().__init__("the note has been changed meanwhile; read it, and write again")
        self.note = note


class Notes:
    """What is kept of a latent: a note, a bookmark, lists; a list is there while a latent is on it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def all(self) -> list[dict[str, Any]]:
        """{sae, latent, note, bookmarked, lists} of every latent of which anything is kept, newest note first."""
        if not self._path.exists():
            return []
        with self._connect() as connection:
            if connection.execute(_ODD).fetchone():
                raise FormatError(f"{self._path} is damaged (a note of another kind); remove it")
            rows = connection.execute("SELECT sae, latent, note, bookmarked FROM notes ORDER BY changed DESC")
            kept = {(sae, latent): _record(sae, latent, note, marked) for sae, latent, note, marked in rows}
            for name, sae, latent in connection.execute("SELECT list, sae, latent FROM listed ORDER BY 2, 3, 1"):
                kept.setdefault((sae, latent), _record(sae, latent, "", 0))["lists"].append(name)
        return [*kept.values()]

    def change(
        self,
        sae: str,
        latent: int,
        *,
        note: str | None = None,
        was: str | None = None,
        bookmarked: bool | None = None,
        lists: Mapping[str, bool] | None = None,
    ) -> dict[str, Any]:
        """Change what is kept of a latent, in one step; what is None stays.

        Args:
            sae, latent: which.
            note: its new text; empty for none.
            was: the text that the writer had seen; None replaces whatever stands there.
            bookmarked: whether it has a bookmark.
            lists: by name of a list, whether the latent is on it.

        Returns:
            {sae, latent, note, bookmarked, lists} as they are now.

        Raises:
            ChangedNoteError: another text than `was` stands there; nothing is changed.
            FormatError: longer than LIMIT or LIST_LIMIT characters, a list without name, or the folder cannot be
                written.
        """
        if note is not None and len(note) > LIMIT:
            raise FormatError(f"a note has at most {LIMIT:,} characters, not {len(note):,}")
        names = {name.strip(): on for name, on in (lists or {}).items()}
        if not all(1 <= len(name) <= LIST_LIMIT for name in names):
            raise FormatError(f"a list's name has 1 to {LIST_LIMIT} characters")
        at = (sae, latent)
        with self._connect() as connection, _alone(connection):
            kept = connection.execute("SELECT note, bookmarked FROM notes WHERE sae = ? AND latent = ?", at).fetchone()
            stands, marked = kept or ("", 0)
            if was not in (None, stands):
                raise ChangedNoteError(stands)
            new = (stands if note is None else note), (marked if bookmarked is None else int(bookmarked))
            if not any(new):
                connection.execute("DELETE FROM notes WHERE sae = ? AND latent = ?", at)
            elif new != kept:
                row = "INSERT OR REPLACE INTO notes VALUES (?, ?, ?, ?, julianday('now'))"
                connection.execute(row, (*at, *new))
            for name, on in names.items():
                change = "INSERT OR IGNORE INTO listed VALUES (?, ?, ?)"
                remove = "DELETE FROM listed WHERE list = ? AND sae = ? AND latent = ?"
                connection.execute(change if on else remove, (name, *at))
            rows = connection.execute("SELECT list FROM listed WHERE sae = ? AND latent = ? ORDER BY list", at)
            return {**_record(*at, *new), "lists": [name for (name,) in rows]}

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=WRITE_SECONDS, isolation_level=None)) as connection:
                for table in _TABLES:
                    connection.execute(table)
                yield connection
        except sqlite3.DatabaseError as error:
            raise FormatError(f"notes cannot be kept in {self._path}: {error}") from None


def named(notes: list[dict[str, Any]], index: Index) -> list[dict[str, Any]]:
    """The same with `label` and `peaks`, what each latent is known by; empty for those of SAEs that are not there."""
    names = index.names((kept["sae"], kept["latent"]) for kept in notes if kept["sae"] in index.saes)
    nameless: dict[str, Any] = {"label": "", "peaks": []}
    return [{**kept, **names.get(f"{kept['sae']}/{kept['latent']}", nameless)} for kept in notes]


def _record(sae: str, latent: int, note: str, bookmarked: int) -> dict[str, Any]:
    return {"sae": sae, "latent": latent, "note": note, "bookmarked": bool(bookmarked), "lists": []}


@contextmanager
def _alone(connection: sqlite3.Connection) -> Iterator[None]:
    """A transaction that no other writer's falls into, from its first read on."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
