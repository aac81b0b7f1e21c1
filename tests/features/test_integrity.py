"""Damaged and hostile indices are named when they are opened, and cost little."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from tiny_run import context, start_server

from qwenscope.checksums import CHECKSUMS_FILE
from qwenscope.errors import FormatError, LockError, QwenscopeError
from qwenscope.features.browser.notes import ChangedNoteError, Notes
from qwenscope.features.form import pack, unpack
from qwenscope.features.index import build_index
from qwenscope.features.store import Index, explaining
from qwenscope.training.lock import run_lock


@pytest.fixture
def copy(index: Index, tmp_path: Path) -> Path:
    return Path(shutil.copytree(index.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("notes.sqlite")))


def test_every_flipped_bit_is_named(copy: Path) -> None:
    choose = random.Random(0)
    paths = sorted(path for path in copy.iterdir() if path.is_file())
    assert len(paths) == 5
    for flip in range(150):
        path = paths[flip % len(paths)]
        whole = path.read_bytes()
        place = choose.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << choose.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(FormatError, match=r"damaged|listed|SHA256SUMS"):
            Index(copy)
        path.write_bytes(whole)
    assert Index(copy).suite()["saes"]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM meta WHERE key = 'splits'",
        "UPDATE meta SET value = '{' WHERE key = 'name'",
        "UPDATE meta SET value = x'00' WHERE key = 'name'",
        "UPDATE saes SET summary = '{}'",
        "UPDATE saes SET summary = replace(summary, '\"dict_size\": 256', '\"dict_size\": 900000')",
        "UPDATE saes SET latents = x'00'",
        "UPDATE saes SET latents = 'text'",
        "UPDATE saes SET summary = json_set(summary, '$.map_shares', 'much')",
        "DELETE FROM latents WHERE key = 3",
        "UPDATE latents SET detail = 5 WHERE key = 3",
        "UPDATE conversations SET length = 'long'",
        "UPDATE conversations SET tokens = x'00'",
        "UPDATE vocabulary SET piece = 3.5 WHERE id = 5",
        "UPDATE peaks SET share = 'much'",
        "UPDATE search SET label = 7 WHERE rowid = 3",
        "DROP INDEX peaks_by_token",
        "DROP TABLE explanations",
        "CREATE VIEW more AS SELECT 1",
        "DROP TABLE peaks; CREATE VIEW peaks AS SELECT 'a' token, 0.5 share, 1 key",
    ],
)
def test_odd_values_are_named_when_it_is_opened(copy: Path, statement: str) -> None:
    _change(copy, statement)
    with pytest.raises(FormatError, match=r"index\.sqlite|the index is damaged") as caught:
        Index(copy)
    assert "\n" not in str(caught.value)


def test_an_index_of_before_there_was_a_map_opens(copy: Path) -> None:
    with closing(sqlite3.connect(copy / "index.sqlite")) as database:
        ((table,),) = database.execute("SELECT latents FROM saes WHERE ordinal = 0")
        ((page,),) = database.execute("SELECT detail FROM latents WHERE key = 3")
    columns, detail = unpack(table), unpack(page)
    for name in ("x", "y", "split"):
        del columns[name]
    del detail["logits"]
    _change(
        copy,
        "UPDATE saes SET latents = ?, summary = json_remove(summary, '$.map_shares') WHERE ordinal = 0",
        pack(columns),
    )
    _change(copy, "UPDATE latents SET detail = ? WHERE key = 3", pack(detail))
    opened = Index(copy)
    assert "x" not in opened.table("sae_delta")
    assert "logits" not in opened.latent("sae_delta", 3)


def test_a_small_cell_cannot_take_much_memory(copy: Path) -> None:
    bomb = zlib.compress(b"[" + b"[]," * (100 << 20) + b"[]]", 9)
    assert len(bomb) < 1 << 20
    _change(copy, "UPDATE latents SET detail = ? WHERE key = 3", bomb)
    opened = Index(copy)
    tracemalloc.start()
    with pytest.raises(FormatError, match="above 4,194,304 bytes"):
        opened.latent("sae_delta", 3)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_a_page_with_missing_parts_is_named(copy: Path) -> None:
    _change(copy, "UPDATE latents SET detail = ? WHERE key = 3", zlib.compress(b'{"fired": 1}'))
    with pytest.raises(FormatError, match=r"density: field required"):
        Index(copy).latent("sae_delta", 3)


def test_labels_keep_the_checksums_true(copy: Path) -> None:
    with explaining(Index(copy)) as add:
        add("sae_delta", 3, {"label": "a word", "samples": {}})
    assert (copy / CHECKSUMS_FILE).exists()
    assert Index(copy).labels("sae_delta")[3] == "a word"
    (copy / CHECKSUMS_FILE).unlink()  # the writer was killed
    assert Index(copy).labels("sae_delta")[3] == "a word"


def _die_in_the_middle_of_labelling(folder: Path) -> None:
    (folder / CHECKSUMS_FILE).unlink()
    database = sqlite3.connect(folder / "index.sqlite")
    database.execute("PRAGMA cache_size = 1")  # pages go to the file before the commit, as they do in the middle of one
    database.execute("UPDATE explanations SET record = json_set(record, '$.label', 'half')")
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_writer_left_half_written_is_rolled_back(copy: Path) -> None:
    before = Index(copy)
    labels = before.labels("sae_delta")
    start_server()
    process = context.Process(target=_die_in_the_middle_of_labelling, args=(copy,))
    process.start()
    process.join()
    assert (copy / "index.sqlite-journal").is_file()
    assert before.labels("sae_delta") == Index(copy).labels("sae_delta") == labels
    assert not (copy / "index.sqlite-journal").exists()


def test_two_do_not_index_into_one_folder(release: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "index" / ".work").mkdir(parents=True)
    with run_lock(tmp_path / "index" / ".work"), pytest.raises(LockError, match="in use by process"):
        build_index(release, tmp_path / "index", data=corpus, tokens=500)
    build_index(release, tmp_path / "index", data=corpus, tokens=500)
    assert Index(tmp_path / "index").meta["tokens"] > 0


def test_of_two_processes_that_index_into_one_folder_one_says_why_it_does_not(
    release: Path, corpus: Path, tmp_path: Path
) -> None:
    start_server()
    both = [context.Process(target=_index, args=(release, corpus, tmp_path, name)) for name in ("a", "b")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert sorted(process.exitcode or 0 for process in both) in ([0, LockError.exit_code], [0, FormatError.exit_code])
    (said,) = (path.read_text() for path in tmp_path.glob("said-*"))
    assert re.fullmatch(r".*(in use by process|holds a finished index).*", said)
    assert Index(tmp_path / "index").meta["tokens"] > 0


def _index(release: Path, corpus: Path, folder: Path, name: str) -> None:
    try:
        build_index(release, folder / "index", data=corpus, tokens=500)
    except QwenscopeError as error:
        (folder / f"said-{name}").write_text(str(error))
        sys.exit(error.exit_code)


def _change(folder: Path, statement: str, *values: object) -> None:
    """Change the database as somebody who makes an index of their own could: no checksums stand beside it."""
    (folder / CHECKSUMS_FILE).unlink(missing_ok=True)
    with closing(sqlite3.connect(folder / "index.sqlite")) as database, database:
        if values:
            database.execute(statement, values)
        else:
            database.executescript(statement)


def test_nothing_is_lost_when_many_write_notes(tmp_path: Path) -> None:
    """Threads stand for tabs: SQLite tells connections apart, not processes."""

    def write(writer: int) -> None:
        notes, seen = Notes(tmp_path), ""
        for line in range(10):
            notes.change("sae", writer, lists={"ours": True, f"list {line}": True})
            while True:
                mine = f"{writer}.{line}"
                try:
                    seen = notes.change("sae", 99, note=f"{seen}\n{mine}".strip(), was=seen)["note"]
                    break
                except ChangedNoteError as error:
                    seen = error.note

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    kept = {one["latent"]: one for one in Notes(tmp_path).all()}
    assert sorted(kept[99]["note"].splitlines()) == sorted(f"{w}.{line}" for w in range(8) for line in range(10))
    assert all(kept[w]["lists"] == [*(f"list {line}" for line in range(10)), "ours"] for w in range(8))


def test_notes_of_before_there_were_lists_are_read(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "notes.sqlite")) as database, database:
        columns = "sae TEXT, latent INTEGER, note TEXT, bookmarked INTEGER, changed REAL, PRIMARY KEY (sae, latent)"
        database.execute(f"CREATE TABLE notes ({columns})")
        database.execute("INSERT INTO notes VALUES ('sae', 1, 'mine', 1, julianday('now'))")
    assert Notes(tmp_path).change("sae", 1, lists={"found": True})["lists"] == ["found"]
    assert Notes(tmp_path).all() == [
        {"sae": "sae", "latent": 1, "note": "mine", "bookmarked": True, "lists": ["found"]}
    ]


@pytest.mark.parametrize("row", [(b"\xff", 1, "n"), ("sae", "one", "n"), ("sae", 1, b"\xff"), (None, 1, "n")])
def test_notes_of_another_kind_are_named(row: tuple[object, ...], tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    notes.change("sae", 0, note="mine", bookmarked=True)
    with closing(sqlite3.connect(tmp_path / "notes.sqlite")) as database, database:
        database.execute("INSERT INTO notes VALUES (?, ?, ?, 0, 0)", row)
    with pytest.raises(FormatError, match=r"notes\.sqlite is damaged"):
        notes.all()
