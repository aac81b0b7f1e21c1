"""The index on disk: one SQLite file to serve, opened read-only; explanations are the only thing written later.

A latent's key is `sae << 32 | latent`. What its page shows beyond numbers is one compressed JSON object per latent;
examples in it name tokens by address, and the texts of all conversations are stored once.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qwenscope.checksums import CHECKSUMS_FILE, write_checksums
from qwenscope.errors import FormatError, QwenscopeError
from qwenscope.features.form import RULE_CLIENT, Columns, Detail, Explanation, Meta, Summary, parsed, unpack
from qwenscope.features.integrity import BUSY_SECONDS, FILE, FILES, read_only, verify_index
from qwenscope.features.statistics import AFTER, BEFORE, WINDOW
from qwenscope.features.token_text import TokenText, alone, readable

VERSION = 2
COMMIT_SECONDS = 1.0
_DETAIL_LIMIT = 4 << 20
"""Bytes of JSON of one latent's page; the largest seen are 30 kB."""
_ROW_LIMIT = 4 << 10
"""Bytes of JSON per latent in an SAE's table."""
_WINDOW = f"""
SELECT start, id, source, split, length,
    substr(tokens, 4 * max(0, :address - start - {BEFORE}) + 1, 4 * {WINDOW}),
    substr(roles, max(0, :address - start - {BEFORE}) + 1, {WINDOW})
FROM conversations WHERE start <= :address ORDER BY start DESC LIMIT 1
"""
_ADDRESS = re.compile(r"(?:(\S+?)\s*[/: ]\s*)?(\d{1,9})")
_WORDS = re.compile(r"\w+", re.UNICODE)


class MissingLatentError(FormatError):
    """The index has no such SAE or latent."""


def key_of(ordinal: int, latent: int) -> int:
    """The key of a latent in every table."""
    return ordinal << 32 | latent


class Index:
    """Read access to an index; every method opens its own connection, so threads may share the object."""

    def __init__(self, folder: Path | str) -> None:
        """Raises FormatError if `folder` holds no index, a damaged one, or one of another version."""
        self.folder = Path(folder)
        self.path = self.folder / FILE
        if not self.path.is_file():
            raise FormatError(f"{folder} holds no {FILE}; build it with `qwenscope index RUN --out {folder}`")
        verify_index(self.folder)
        cells = self._all("SELECT key, value FROM meta")
        version = dict(cells).get("version")
        if version != str(VERSION):
            raise FormatError(f"{self.path} has version {version}, not {VERSION}; build it again")
        self.meta = parsed("{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in cells) + "}", Meta)
        rows = self._all("SELECT ordinal, id, summary FROM saes ORDER BY ordinal")
        self.saes: dict[str, dict[str, Any]] = {id: parsed(summary, Summary) for _, id, summary in rows}
        self._ordinals: dict[str, int] = {id: ordinal for ordinal, id, _ in rows}
        self._ids = {ordinal: id for id, ordinal in self._ordinals.items()}
        self._pieces: dict[int, TokenText] = {}
        if sorted(self._ids) != list(range(len(self._ids))):
            raise FormatError(f"{self.path} is damaged (an SAE is missing); build it again")
        for sae_id in self.saes:
            self._check_rows(sae_id)

    def suite(self) -> dict[str, Any]:
        """What the overview shows: {"meta", "saes": {id: summary}}."""
        return {"meta": self.meta, "roles": self.meta["roles"], "saes": self.saes}

    def table(self, sae_id: str) -> dict[str, Any]:
        """Columns over all latents of one SAE: density, max, mean, role, split, peaks, promoted, x and y of its map.

        Indices made before there was a map have no split, x and y.
        """
        limit = _ROW_LIMIT * (1 + self.saes[sae_id]["dict_size"])
        columns: dict[str, Any] = unpack(self.packed_table(sae_id), Columns, limit)
        return columns

    def packed_table(self, sae_id: str) -> bytes:
        """`table` as zlib-compressed JSON, the way it is stored: what a browser calls deflate."""
        ((blob,),) = self._all("SELECT latents FROM saes WHERE ordinal = ?", self.ordinal(sae_id))
        return bytes(blob)

    def alive(self, sae_id: str) -> list[int]:
        """The latents of an SAE that fired at all."""
        return [latent for latent, density in enumerate(self.table(sae_id)["density"]) if density > 0]

    def labels(self, sae_id: str) -> dict[int, str]:
        """{latent: label}; those that no one has read, but a rule made of counts, begin with `form.RULE`."""
        ordinal = self.ordinal(sae_id)
        low, high = key_of(ordinal, 0), key_of(ordinal + 1, 0)
        label = "json_extract(record, '$.label')"
        rows = self._all(f"SELECT key, {label} FROM explanations WHERE key >= ? AND key < ?", low, high)
        if any(not isinstance(label, str) for _, label in rows):
            raise FormatError(f"{self.path} is damaged (a latent without label); build it again")
        return {key - low: label for key, label in rows}

    def latent(self, sae_id: str, latent: int) -> dict[str, Any]:
        """Everything that a latent's page shows.

        Raises:
            MissingLatentError: no such SAE or latent.
        """
        self.check(sae_id, latent)
        key = key_of(self.ordinal(sae_id), latent)
        with self._connect() as connection:
            row = connection.execute("SELECT detail FROM latents WHERE key = ?", (key,)).fetchone()
            detail: dict[str, Any] = unpack(row[0], Detail, _DETAIL_LIMIT)
            ids = {token for name in ("promoted", "suppressed") for token, _ in detail[name]}
            contexts = [self._context(connection, example) for example in detail["examples"]]
            ids.update(token for context in contexts for token in context["tokens"])
            pieces = self._read_pieces(connection, ids)
            record = connection.execute("SELECT record FROM explanations WHERE key = ?", (key,)).fetchone()
            detail["names"] = self._names(connection, [(sae_id, latent), *_others(sae_id, detail)])
        for context in contexts:
            context["tokens"] = readable([pieces[token] for token in context["tokens"]])
        detail["examples"] = contexts
        for name in ("promoted", "suppressed"):
            detail[name] = [[alone(pieces[token]), score] for token, score in detail[name]]
        detail["explanation"] = parsed(record[0], Explanation) if record else None
        if record:
            detail["explanation"].pop("samples", None)  # hundreds of tokens that no page shows
        return {"sae": sae_id, "latent": latent, **detail}

    def conversation(self, start: int) -> dict[str, Any]:
        """The whole conversation whose first token has the address `start`, as an example names it.

        Returns:
            {"start", "id", "source", "split", "ids", "tokens", "roles"}: ids, texts and role codes of its tokens.

        Raises:
            MissingLatentError: none begins there.
        """
        read = "SELECT id, source, split, tokens, roles FROM conversations WHERE start = ?"
        with self._connect() as connection:
            row = connection.execute(read, (start,)).fetchone()
            if row is None:
                raise MissingLatentError(f"no conversation of the index begins at {start}")
            id, source, split, tokens, roles = row
            ids = np.frombuffer(tokens, dtype="<i4").tolist()
            pieces = self._read_pieces(connection, set(ids))
        texts = readable([pieces[token] for token in ids])
        names = {"start": start, "id": id, "source": source, "split": split}
        return {**names, "ids": ids, "tokens": texts, "roles": list(roles)}

    def conversation_starts(self) -> list[int]:
        """The address of each conversation's first token."""
        return [start for (start,) in self._all("SELECT start FROM conversations ORDER BY start")]

    def _names(self, connection: sqlite3.Connection, latents: Iterable[tuple[str, int]]) -> dict[str, dict[str, Any]]:
        """{"sae_id/latent": {"label", "peaks"}}."""
        keys = {key_of(self.ordinal(sae_id), latent): f"{sae_id}/{latent}" for sae_id, latent in latents}
        rows = connection.execute(
            f"SELECT rowid, label, peaks FROM search WHERE rowid IN ({','.join('?' * len(keys))})", list(keys)
        )
        return {keys[key]: {"label": label, "peaks": _split(peaks)} for key, label, peaks in rows}

    def search(self, text: str, *, sae_id: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """Latents by peak token, promoted token, label or context, best first.

        A query that is an address (sae_attn_mid/40, or 40 for that latent of every SAE) finds it first. One that is
        exactly a token (spaces aside, any case) finds the latents that peak there most often; after them come full-text
        matches, the last word as a prefix.
        """
        query = text.strip().lower()
        if not query:
            return []
        low, high = 0, key_of(len(self._ids), 0)
        if sae_id is not None:
            low, high = key_of(self.ordinal(sae_id), 0), key_of(self.ordinal(sae_id) + 1, 0)
        found: dict[int, str] = dict.fromkeys(self._addressed(query, low, high), "address")
        with self._connect() as connection:
            exact = "SELECT key FROM peaks WHERE token = ? AND key >= ? AND key < ? ORDER BY share DESC, key LIMIT ?"
            for (key,) in connection.execute(exact, (query, low, high, limit)):
                found.setdefault(key, "peak")
            if (match := _match(query)) and len(found) < limit:
                full = (
                    "SELECT rowid FROM search WHERE search MATCH ? AND rowid >= ? AND rowid < ? "
                    "ORDER BY bm25(search, 8, 6, 3, 1) LIMIT ?"
                )
                for (key,) in connection.execute(full, (match, low, high, limit)):
                    found.setdefault(key, "text")
            return [self._hit(connection, key, why) for key, why in list(found.items())[:limit]]

    def _addressed(self, query: str, low: int, high: int) -> list[int]:
        """Keys from `low` to `high` of the latents that a query names."""
        if not (match := _ADDRESS.fullmatch(query)):
            return []
        wanted, latent = match[1], int(match[2])
        keys = [
            key_of(ordinal, latent)
            for sae_id, ordinal in self._ordinals.items()
            if wanted in (None, sae_id.lower()) and latent < self.saes[sae_id]["dict_size"]
        ]
        return [key for key in keys if low <= key < high]

    def names(self, latents: Iterable[tuple[str, int]]) -> dict[str, dict[str, Any]]:
        """What each of these latents is known by: {"sae_id/latent": {"label", "peaks"}}."""
        with self._connect() as connection:
            return self._names(connection, latents)

    def hits(self, latents: Iterable[tuple[str, int]], why: str) -> list[dict[str, Any]]:
        """What `search` says of each of these latents."""
        with self._connect() as connection:
            return [self._hit(connection, key_of(self.ordinal(sae_id), latent), why) for sae_id, latent in latents]

    def _hit(self, connection: sqlite3.Connection, key: int, why: str) -> dict[str, Any]:
        row = connection.execute(
            "SELECT label, peaks, promoted, density FROM search JOIN latents ON key = search.rowid "
            "WHERE search.rowid = ?",
            (key,),
        ).fetchone()
        label, peaks, promoted, density = row
        return {
            "sae": self._ids[key >> 32],
            "latent": key & 0xFFFFFFFF,
            "why": why,
            "label": label,
            "peaks": _split(peaks),
            "promoted": _split(promoted),
            "density": density,
        }

    def check(self, sae_id: str, latent: int) -> None:
        """Raises MissingLatentError unless the index has this latent."""
        self.ordinal(sae_id)
        if not 0 <= latent < self.saes[sae_id]["dict_size"]:
            raise MissingLatentError(f"{sae_id} has no latent {latent}")

    def ordinal(self, sae_id: str) -> int:
        """Place of an SAE in the suite; MissingLatentError if there is none."""
        if sae_id not in self._ordinals:
            raise MissingLatentError(f"the index has no SAE {sae_id}; it has {', '.join(self._ordinals)}")
        return self._ordinals[sae_id]

    def _check_rows(self, sae_id: str) -> None:
        """As many latents as the summary says, in the table and one by one; the summary is what bounds the rest."""
        size = self.saes[sae_id]["dict_size"]
        low, high = key_of(self.ordinal(sae_id), 0), key_of(self.ordinal(sae_id) + 1, 0)
        ((rows, first, last),) = self._all(
            "SELECT count(*), min(key), max(key) FROM latents WHERE key >= ? AND key < ?", low, high
        )
        if (rows, first, last) != (size, low, low + size - 1):
            raise FormatError(f"{self.path} is damaged ({rows} of {size} latents of {sae_id}); build it again")
        if {len(column) for column in self.table(sae_id).values()} != {size}:
            raise FormatError(f"{self.path} is damaged (the table of {sae_id} has another length); build it again")

    def _context(self, connection: sqlite3.Connection, example: list[Any]) -> dict[str, Any]:
        """The window around an example's address: token ids, activations, roles."""
        kind, address, offsets, values = example
        start, id, source, split, length, tokens, roles = connection.execute(_WINDOW, {"address": address}).fetchone()
        peak = address - start
        low, high = max(0, peak - BEFORE), min(length, peak + AFTER + 1)
        activations = [0.0] * (high - low)
        for offset, value in zip(offsets, values, strict=True):
            activations[peak - BEFORE + offset - low] = value
        return {
            "kind": kind,
            "tokens": np.frombuffer(tokens, dtype="<i4")[: high - low].tolist(),
            "roles": list(roles[: high - low]),
            "activations": activations,
            "peak": peak - low,
            "position": peak,
            "start": start,
            "conversation": id,
            "source": source,
            "split": split,
        }

    def _read_pieces(self, connection: sqlite3.Connection, ids: set[int]) -> dict[int, TokenText]:
        """Pieces of the vocabulary by id, `ids` among them; each is read once."""
        missing = sorted(ids - self._pieces.keys())
        for start in range(0, len(missing), 500):
            part = missing[start : start + 500]
            marks = ",".join("?" * len(part))
            self._pieces.update(connection.execute(f"SELECT id, piece FROM vocabulary WHERE id IN ({marks})", part))
        return self._pieces

    def _all(self, sql: str, *values: Any) -> list[Any]:
        with self._connect() as connection:
            return connection.execute(sql, values).fetchall()

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        """A connection for one answer; whatever odd values do to its making is named as the damage it is."""
        try:
            with closing(read_only(self.path)) as connection:
                yield connection
        except QwenscopeError:
            raise
        except (sqlite3.Error, LookupError, TypeError, ValueError, OverflowError) as error:
            said = f"{type(error).__name__}: {error}"
            raise FormatError(f"{self.path} is no index or is damaged ({said}); build it again") from None


@contextmanager
def explaining(index: Index) -> Iterator[Callable[[str, int, dict[str, Any]], None]]:
    """Yields what stores one (sae_id, latent, record with `label`); on disk within a second, and at the end.

    The checksums are taken away meanwhile and made anew at the end, so that a killed writer leaves a sound index.
    """
    (index.folder / CHECKSUMS_FILE).unlink(missing_ok=True)
    with closing(sqlite3.connect(index.path, timeout=BUSY_SECONDS)) as connection:
        connection.execute("PRAGMA cache_spill = OFF")  # else a full cache would lock readers out before the commit
        committed = time.monotonic()

        def add(sae_id: str, latent: int, record: dict[str, Any]) -> None:
            nonlocal committed
            key = key_of(index.ordinal(sae_id), latent)
            try:
                connection.execute("INSERT OR REPLACE INTO explanations VALUES (?, ?)", (key, json.dumps(record)))
                connection.execute("UPDATE search SET label = ? WHERE rowid = ?", (record["label"], key))
            except BaseException:
                connection.rollback()  # no half of a label is kept
                raise
            if time.monotonic() - committed > COMMIT_SECONDS:
                connection.commit()
                committed = time.monotonic()

        try:
            yield add
        finally:
            connection.commit()
            connection.close()
            write_checksums(index.folder, FILES)


def explained_by(index: Index, client: str | None) -> set[tuple[str, int]]:
    """(SAE id, latent) of those that a client has labelled; None: anyone but the rule that built the index."""
    ids = list(index.saes)
    by, name = ("IS NOT", RULE_CLIENT) if client is None else ("IS", client)
    with closing(read_only(index.path)) as connection:
        keys = connection.execute(
            f"SELECT key FROM explanations WHERE json_extract(record, '$.client') {by} ?", (name,)
        )
        return {(ids[key >> 32], key & 0xFFFFFFFF) for (key,) in keys}


def read_explanations(index: Index) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Every explanation that someone wrote as (sae_id, latent, record), by SAE and latent; not those by rule."""
    ids = list(index.saes)
    read = "SELECT key, record FROM explanations WHERE json_extract(record, '$.client') IS NOT ? ORDER BY key"
    with closing(read_only(index.path)) as connection:
        for key, record in connection.execute(read, (RULE_CLIENT,)):
            yield ids[key >> 32], key & 0xFFFFFFFF, parsed(record, Explanation)


def _others(sae_id: str, detail: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The latents that a page links to."""
    for name in ("neighbours", "coactive"):
        yield from ((sae_id, other) for other, *_ in detail[name])
    yield from ((other_sae, other) for other_sae, other, _ in detail["elsewhere"])


def _split(joined: str) -> list[str]:
    return joined.split("\x1f") if joined else []


def _match(query: str) -> str:
    """An FTS5 expression that holds nothing but quoted words: all of them, the last one as a prefix."""
    words = _WORDS.findall(query)
    return " ".join(f'"{word}"' for word in words) + "*" if words else ""
