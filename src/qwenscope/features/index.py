"""Build a feature index: one pass over a corpus, then what each latent's page, search and Parquet need.

    build_index("runs/demo", Path("runs/demo-index"))

The folder holds `index.sqlite` (to browse), `latents.parquet` and `examples.parquet` (to publish; text that passed the
recipe's privacy filter only), `origin.json` (where SAEs and language model are, for this machine alone) and their
`SHA256SUMS`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qwenscope.checksums import CHECKSUMS_FILE, write_checksums
from qwenscope.corpus.conversation import ROLES
from qwenscope.errors import FormatError
from qwenscope.features.corpus_pass import CorpusPass, OnProgress
from qwenscope.features.describe import Describer, Latent, Texts, places_on_map, summary_of
from qwenscope.features.form import RULE_CLIENT, pack
from qwenscope.features.integrity import FILE, FILES, PEAKS_BY_TOKEN, SCHEMA
from qwenscope.features.parquet import ParquetFiles
from qwenscope.features.store import VERSION, key_of
from qwenscope.features.token_text import TokenText, vocabulary_pieces
from qwenscope.files import disk_errors_named, fsync_file, fsync_folder, read_json, write_json
from qwenscope.lm.forward import unembedding
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import SPLITS, Target, open_target
from qwenscope.training.lock import run_lock

logger = logging.getLogger(__name__)

ORIGIN = "origin.json"
DEFAULT_TOKENS = 1_000_000


def build_index(
    target: Path | str,
    out: Path,
    *,
    data: Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    on_progress: OnProgress | None = None,
) -> None:
    """Index every latent of every SAE of `target` into the folder `out`; run again, it goes on where it stopped.

    Args:
        target: what `open_target` takes.
        out: folder that is made; memory is bounded whatever `tokens` is.
        data: .parquet, .jsonl or .jsonl.gz file, or a folder of them; None takes the conversations that the recipe
            holds out from training. The recipe's privacy filter applies to both.
        tokens: how many are read; fewer if the corpus ends.
        on_progress: called with (phase, done, total).

    Raises:
        FormatError, HubError: as `open_target`; or `out` holds a finished index, or the beginnings of one of
            another target, corpus or length.
        ModelError: the language model cannot be loaded, or does not have the hook points.
        CorpusError: no conversations.
        LockError: another process is indexing into `out`.
        ResourceError: the disk is full.
    """
    report = on_progress or (lambda phase, done, total: None)
    if tokens < 1:
        raise FormatError(f"an index needs at least 1 token, not {tokens}")
    work = out / ".work"
    if (out / FILE).exists() and work.is_dir():  # of a process that was killed at the very end
        with run_lock(work):
            shutil.rmtree(work)
    _check_unfinished(out)
    opened = open_target(target)
    with disk_errors_named(out):
        work.mkdir(parents=True, exist_ok=True)
    with run_lock(work), disk_errors_named(out):
        _check_unfinished(out)  # another one may have finished it meanwhile
        report("loading model", 0, 1)
        lm = opened.language_model(truncated=True)
        report("loading model", 1, 1)
        corpus_pass = CorpusPass(opened, lm, data, tokens, work)
        corpus_pass.run(report)
        _finish(corpus_pass, out, work, report)


def _check_unfinished(out: Path) -> None:
    if (out / FILE).exists():
        raise FormatError(f"{out} holds a finished index; choose another folder, or remove it")
    if out.exists() and any(path.name not in (".work", CHECKSUMS_FILE, *FILES) for path in out.iterdir()):
        raise FormatError(f"{out} exists and is not an index; choose another folder")


def open_origin(index: Path) -> Target:
    """The SAEs that an index was made with, for running new text.

    Raises:
        FormatError: the index was moved here from another machine, or the target is gone.
    """
    origin = index / ORIGIN
    if not origin.is_file():
        raise FormatError(
            f"{index} has no {ORIGIN}: it was published without its SAEs; build an index here to run text"
        )
    return open_target(read_json(origin)["target"])


def _finish(corpus_pass: CorpusPass, out: Path, work: Path, report: OnProgress) -> None:
    """Describe every latent, write the files aside, put them in place (the SQLite file last), remove the rest."""
    aside = work / "finished"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    total = sum(sae.dict_size for sae in corpus_pass.target.saes.values())
    done = 0
    with closing(sqlite3.connect(aside / FILE)) as database, database:
        database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + SCHEMA)
        texts = Texts(corpus_pass, _write_vocabulary(database, corpus_pass.lm))
        _write_conversations(database, corpus_pass)
        _write_meta(database, corpus_pass)
        # Text that was not scrubbed must not lie about in a form made for publishing.
        publish = corpus_pass.target.recipe.corpus.privacy.scrub
        with ParquetFiles(aside, texts) if publish else nullcontext() as parquet:
            for ordinal, sae_id in enumerate(corpus_pass.target.saes):
                describer = Describer(corpus_pass, sae_id, texts)
                columns: dict[str, list[Any]] = {}
                for block in describer.blocks():
                    _write_block(database, ordinal, block)
                    if parquet is not None:
                        parquet.add(sae_id, block)
                    for latent in block:
                        for name, value in latent.columns.items():
                            columns.setdefault(name, []).append(value)
                    done += len(block)
                    report("describing", done, total)
                places, shares = places_on_map(corpus_pass, sae_id, columns["density"])
                summary = json.dumps({**summary_of(corpus_pass, sae_id, columns), "map_shares": shares})
                row = (ordinal, sae_id, summary, pack(columns | places))
                database.execute("INSERT INTO saes VALUES (?, ?, ?, ?)", row)
        database.execute(PEAKS_BY_TOKEN)
        database.execute("INSERT INTO search (search) VALUES ('optimize')")
    target = corpus_pass.target
    write_json(aside / ORIGIN, {"target": target.name if target.on_hub else str(target.folder.resolve())})
    write_checksums(aside, FILES)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == FILE):
        fsync_file(path)
        os.replace(path, out / path.name)
    fsync_folder(out)
    shutil.rmtree(work)


def _write_vocabulary(database: sqlite3.Connection, lm: LanguageModel) -> list[TokenText]:
    """Every token's text, or bytes where it writes a part of a character."""
    pieces = vocabulary_pieces(lm.tokenizer, len(unembedding(lm)))
    database.executemany("INSERT INTO vocabulary VALUES (?, ?)", enumerate(pieces))
    return pieces


def _write_conversations(database: sqlite3.Connection, corpus_pass: CorpusPass) -> None:
    def rows() -> Iterator[tuple[Any, ...]]:
        for address, text in corpus_pass.texts():
            starts = np.concatenate([[0], np.cumsum(text["lengths"])])
            for i, length in enumerate(text["lengths"].tolist()):
                part = slice(int(starts[i]), int(starts[i + 1]))
                tokens, roles = text["tokens"][part].astype("<i4").tobytes(), text["roles"][part].tobytes()
                names = str(text["ids"][i]), str(text["sources"][i]), str(text["splits"][i])
                yield (address + part.start, *names, length, tokens, roles)

    database.executemany("INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?)", rows())


def _write_meta(database: sqlite3.Connection, corpus_pass: CorpusPass) -> None:
    recipe, lm = corpus_pass.target.recipe, corpus_pass.lm
    standard = lm.name if not Path(lm.name).is_dir() else Path(lm.name).name
    meta = {
        "version": VERSION,
        "qwenscope": version("qwenscope"),
        "name": Path(corpus_pass.target.name).resolve().name,
        "language_model": {"name": standard, "revision": lm.revision, "layers": list(lm.layer_kinds)},
        "tokens": corpus_pass.read,
        "left_out": corpus_pass.left_out,
        "data": "held out by the recipe" if corpus_pass.data is None else corpus_pass.data.name,
        "privacy": recipe.corpus.privacy.model_dump(),
        "splits": list(SPLITS),
        "roles": list(ROLES),
    }
    database.executemany("INSERT INTO meta VALUES (?, ?)", [(key, json.dumps(value)) for key, value in meta.items()])


def _write_block(database: sqlite3.Connection, ordinal: int, block: list[Latent]) -> None:
    keys = [key_of(ordinal, latent.number) for latent in block]
    database.executemany(
        "INSERT INTO latents VALUES (?, ?, ?)",
        [(key, latent.columns["density"], pack(latent.detail)) for key, latent in zip(keys, block, strict=True)],
    )
    database.executemany(
        "INSERT INTO search (rowid, label, peaks, promoted, context) VALUES (?, ?, ?, ?, ?)",
        [(key, *latent.search) for key, latent in zip(keys, block, strict=True)],
    )
    unread: dict[str, Any] = {"client": RULE_CLIENT, "detection": None, "fuzzing": None, "unparsed": []}
    labels = [(key, latent.search[0]) for key, latent in zip(keys, block, strict=True) if latent.search[0]]
    database.executemany(
        "INSERT INTO explanations VALUES (?, ?)",
        [(key, json.dumps({"label": label, **unread}, ensure_ascii=False)) for key, label in labels],
    )
    database.executemany(
        "INSERT INTO peaks VALUES (?, ?, ?)",
        [(token, share, key) for key, latent in zip(keys, block, strict=True) for token, share in latent.peaks],
    )
