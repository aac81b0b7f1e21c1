"""Exports of two suites go into a PostgreSQL database of Neuronpedia's shape, as its importer puts them there.

The importer passes silently over a record whose key it knows, so that what counts is whether every record arrived.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from tiny_run import make_language_model, make_suite

from qwenscope import load_suite
from qwenscope.features.index import build_index
from qwenscope.features.store import Index, explaining
from qwenscope.release.neuronpedia import export_with_index

TABLES = Path(__file__).with_name("neuronpedia_tables.sql")
FILES = {"release": "SourceRelease", "model": "Model", "sourceset": "SourceSet", "source": "Source"}
FOLDERS = {"features": "Neuron", "activations": "Activation", "explanations": "Explanation"}


class Database:
    """A PostgreSQL server of its own, reached by a socket in its folder."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs = folder, programs
        self.user = "nobody" if os.getuid() == 0 else None  # the server refuses to run as root
        if self.user:
            shutil.chown(folder, self.user)
        self.run("initdb", "-D", "data", "-A", "trust", "-U", "test", "--no-sync", "-E", "UTF8")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        self.run("pg_ctl", "-D", "data", "-w", "-l", "log", "-o", options, "start")

    def run(self, program: str, *arguments: str, sql: str | None = None) -> str:
        command = [self.programs / program, *arguments]
        done = subprocess.run(command, cwd=self.folder, user=self.user, input=sql, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def query(self, sql: str) -> str:
        arguments = ("-h", str(self.folder), "-U", "test", "-d", "postgres", "-v", "ON_ERROR_STOP=1", "-qAt")
        return self.run("psql", *arguments, sql=sql).strip()

    def insert(self, table: str, records: list[dict[str, Any]]) -> None:
        """The columns of the first record, of all records; what is there already stays."""
        columns = ", ".join(f'"{name}"' for name in records[0])
        data = json.dumps(records).replace("\\u0000", " ").replace("'", "''")
        self.query(
            f'INSERT INTO "{table}" ({columns}) SELECT {columns} '
            f"FROM jsonb_populate_recordset(NULL::\"{table}\", '{data}') ON CONFLICT DO NOTHING"
        )


@pytest.fixture
def database() -> Iterator[Database]:
    found = [Path(path).parent for path in (shutil.which("initdb"),) if path]
    found += sorted(path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL server is installed")
    folder = Path(mkdtemp(prefix="pg", dir="/tmp"))  # a socket's path is short, and the server's user enters
    database = Database(folder, found[-1])
    try:
        database.query(f"{TABLES.read_text()}; INSERT INTO \"User\" VALUES ('clkht01d40000jv08hvalcvly')")
        yield database
    finally:
        database.run("pg_ctl", "-D", "data", "-m", "immediate", "stop")
        shutil.rmtree(folder)


def put(database: Database, export: Path) -> dict[str, int]:
    """Import an export as Neuronpedia does; returns how many records of each table it holds."""
    held = dict.fromkeys(FOLDERS.values(), 0)
    for source in sorted(path for path in export.glob("v1/*/*") if path.is_dir()):
        for file, table in FILES.items():
            records = [json.loads(line) for line in (source / f"{file}.jsonl").read_text().splitlines()]
            database.insert(table, records)
        for folder, table in FOLDERS.items():
            for path in sorted((source / folder).glob("*.jsonl.gz")):
                records = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
                database.insert(table, records)
                held[table] += len(records)
    return held


@pytest.mark.slow
def test_every_record_of_two_suites_arrives(database: Database, tmp_path: Path) -> None:
    run = make_suite(tmp_path / "first", make_language_model(tmp_path / "Tiny"), 1)
    for path in (run / "saes").glob("*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "org/Tiny"}))
    build_index(run, tmp_path / "index", tokens=1500)
    with explaining(Index(tmp_path / "index")) as add:
        add("sae_attn", 7, {"label": "it's seven"})
    second = shutil.copytree(run, tmp_path / "second")
    total = dict.fromkeys(FOLDERS.values(), 0)
    for suite in (run, second):
        export_with_index(suite, tmp_path / "index", tmp_path / f"np-{suite.name}")
        for table, count in put(database, tmp_path / f"np-{suite.name}").items():
            total[table] += count
            assert database.query(f'SELECT count(*) FROM "{table}"') == str(total[table])
    assert total["Neuron"] == 2 * sum(sae.dict_size for sae in load_suite(run).values())
    assert total["Explanation"] == 2
    assert database.query('SELECT name FROM "SourceRelease" ORDER BY name').split() == ["first", "second"]
    assert database.query('SELECT id, owner, visibility FROM "Model"') == "tiny|org|PUBLIC"
    page = Index(tmp_path / "index").latent("sae_attn", 7)
    found = database.query(
        """SELECT pos_values[1] FROM "Neuron" WHERE index = '7' AND layer LIKE '3-first-sae_attn-%'"""
    )
    assert float(found) == pytest.approx(page["promoted"][0][1] * page["logit_spread"])
