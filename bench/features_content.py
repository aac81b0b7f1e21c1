"""An index of random content with the sizes of a real one: what the benchmarks of the browser serve."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from qwenscope.corpus.conversation import ROLES
from qwenscope.features.form import pack
from qwenscope.features.integrity import FILE, PEAKS_BY_TOKEN, SCHEMA
from qwenscope.features.store import VERSION, key_of
from qwenscope.recipe import load_recipe

RECIPE = "qwen3.5-35b-a3b"
"""Whose hook points the random SAEs stand at."""
CONVERSATIONS, LENGTH = 2000, 1024
LAYERS = 40
DETAILS = 512
"""Different latent pages; every latent shows one of them."""


def random_index(folder: Path, latents: int) -> list[str]:
    """Write nine SAEs of `latents` latents each into `folder`; returns the vocabulary."""
    choose = random.Random(1)
    words = sorted(
        {"".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=choose.randint(3, 9))) for _ in range(50_000)}
    )
    with closing(sqlite3.connect(folder / FILE)) as database, database:
        database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + SCHEMA)
        database.executemany("INSERT INTO vocabulary VALUES (?, ?)", enumerate(f" {word}" for word in words))
        database.executemany("INSERT INTO conversations VALUES (?, ?, 'bench', 'chat', ?, ?, ?)", _texts(len(words)))
        database.executemany(
            "INSERT INTO meta VALUES (?, ?)", [(key, json.dumps(value)) for key, value in _META.items()]
        )
        for ordinal, (sae_id, point) in enumerate(load_recipe(RECIPE).hook_points.items()):
            summary = {"layer": point.layer, "kind": point.kind, "k": point.k, **_summary(latents)}
            _add_sae(database, choose, ordinal, sae_id, summary, words)
        database.execute(PEAKS_BY_TOKEN)
    return words


_META = {
    "version": VERSION,
    "name": "bench",
    "language_model": {"name": RECIPE, "layers": ["attention" if i % 4 == 3 else "deltanet" for i in range(LAYERS)]},
    "tokens": CONVERSATIONS * LENGTH,
    "data": "random",
    "privacy": {"scrub": True},
    "splits": ["chat", "tool_use"],
    "roles": list(ROLES),
}


def _summary(latents: int) -> dict[str, Any]:
    return {
        "dict_size": latents,
        "tokens": CONVERSATIONS * LENGTH,
        "dead": 0,
        "l0": 64.0,
        "density": {"first": -6, "per_decade": 4, "counts": [0] * 8 + [latents // 8] * 8 + [0] * 8},
        "map_shares": [0.02, 0.01],
        "base_splits": [0.7, 0.3],
        "base_roles": [1 / len(ROLES)] * len(ROLES),
        "experts": 256,
        "quality": {},
    }


def _texts(words: int) -> Iterator[tuple[int, str, int, bytes, bytes]]:
    tokens = np.random.default_rng(0).integers(0, words, (CONVERSATIONS, LENGTH), dtype="<i4")
    for i, row in enumerate(tokens):
        yield i * LENGTH, f"{i:016x}", LENGTH, row.tobytes(), bytes(LENGTH)


def _add_sae(
    database: sqlite3.Connection,
    choose: random.Random,
    ordinal: int,
    sae_id: str,
    summary: dict[str, Any],
    words: list[str],
) -> None:
    latents = summary["dict_size"]
    some = lambda count: choose.choices(words, k=count)  # noqa: E731
    keys = [key_of(ordinal, latent) for latent in range(latents)]
    peaks = [some(4) for _ in keys]
    columns = {
        "density": [choose.random() * 0.01 for _ in keys],
        "max": [choose.random() * 50 for _ in keys],
        "mean": [choose.random() * 20 for _ in keys],
        "role": [choose.randrange(len(ROLES)) for _ in keys],
        "split": [choose.randrange(2) for _ in keys],
        "x": [round(choose.gauss(0, 250)) for _ in keys],
        "y": [round(choose.gauss(0, 250)) for _ in keys],
        "peaks": peaks,
        "promoted": [some(3) for _ in keys],
    }
    details = [pack(_detail(choose, len(words), latents)) for _ in range(DETAILS)]
    database.execute("INSERT INTO saes VALUES (?, ?, ?, ?)", (ordinal, sae_id, json.dumps(summary), pack(columns)))
    database.executemany("INSERT INTO latents VALUES (?, 0.01, ?)", ((key, choose.choice(details)) for key in keys))
    database.executemany(
        "INSERT INTO search (rowid, label, peaks, promoted, context) VALUES (?, '', ?, ?, ?)",
        (
            (key, "\x1f".join(at), "\x1f".join(some(12)), " ".join(some(52)))
            for key, at in zip(keys, peaks, strict=True)
        ),
    )
    database.executemany(
        "INSERT INTO peaks VALUES (?, 0.3, ?)",
        ((word, key) for key, at in zip(keys, peaks, strict=True) for word in at),
    )


def _detail(choose: random.Random, words: int, latents: int) -> dict[str, Any]:
    ranking = lambda top, count: [[choose.randrange(top), round(choose.random() * 5, 3)] for _ in range(count)]  # noqa: E731
    return {
        "fired": 5000,
        "density": 0.01,
        "mean": 3.0,
        "max": 20.0,
        "histogram": {"first": -1.0, "per_octave": 4, "counts": [choose.randrange(500) for _ in range(30)]},
        "splits": [4000, 1000],
        "roles": [choose.randrange(1000) for _ in ROLES],
        "promoted": ranking(words, 12),
        "suppressed": ranking(words, 12),
        "logits": {"first": -5.0, "per_sd": 4, "counts": [choose.randrange(20_000) for _ in range(40)]},
        "neighbours": ranking(latents, 10),
        "elsewhere": [["sae_attn_mid", choose.randrange(latents), 0.5] for _ in range(8)],
        "coactive": [[*pair, 40] for pair in ranking(latents, 10)],
        "experts": [[e, 0.3, 0.1] for e in range(8)],
        "examples": [
            _example(choose, kind)
            for kind in ["top"] * 20 + ["75-100", "50-75", "25-50", "0-25"] * 4 + ["negative"] * 10
        ],
    }


def _example(choose: random.Random, kind: str) -> list[Any]:
    address = choose.randrange(CONVERSATIONS) * LENGTH + choose.randrange(32, LENGTH - 32)
    return [kind, address, sorted(choose.sample(range(48), 8)), [round(choose.random() * 20, 2) for _ in range(8)]]
