"""Benchmarks of the feature index and its browser; each prints one JSON object.

    python bench/features.py rate --tokens 20000          index build beside the bare forward pass, on the stand-in
    python bench/features.py serve [--latents 16384]      latency of pages and search, nine SAEs of random content

Times are CPU seconds of this process; `serve` adds the wall clock, which on a busy machine tells of the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from starlette.testclient import TestClient

from qwenscope.activations.harvest import harvest
from qwenscope.evaluation.run import Target
from qwenscope.features.browser.server import make_app
from qwenscope.features.reading import CorpusPass, open_stream
from qwenscope.features.store import FILE, SCHEMA, VERSION, Index, key_of, pack
from qwenscope.lm.load import load_language_model
from qwenscope.recipe import load_recipe
from qwenscope.sae.topk import TopKSAE

LENGTH = 1024
"""Tokens of each random conversation."""


def rate(tokens: int) -> dict[str, Any]:
    """CPU seconds of reading the corpus, of indexing each chunk, and of the bare forward pass over the same chunk."""
    recipe = load_recipe("standin")
    saes = {name: TopKSAE(64, point.dict_size, point.k, seed=point.layer) for name, point in recipe.hook_points.items()}
    lm = load_language_model(recipe.lm, last_layer=max(recipe.layers), lm_head=True)
    seconds: dict[str, list[float]] = {"corpus": [], "index": [], "forward": []}
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder), recipe, saes, {})
        corpus_pass = CorpusPass(target, lm, None, tokens, Path(folder))
        stream = open_stream(target, lm.tokenizer, None)
        while corpus_pass.read < tokens:
            marks = [time.process_time()]
            conversations = corpus_pass._next_chunk(stream)
            marks.append(time.process_time())
            corpus_pass._add(conversations)
            marks.append(time.process_time())
            harvest(lm, conversations, recipe.layers, recipe.activations, recipe.corpus.batch_tokens)
            marks.append(time.process_time())
            for name, spent in zip(seconds, np.diff(marks), strict=True):
                seconds[name].append(float(spent))
    shares = [forward / index for forward, index in zip(seconds["forward"], seconds["index"], strict=True)]
    return {
        "tokens": corpus_pass.read,
        "cpu_seconds": {name: round(sum(spent), 2) for name, spent in seconds.items()},
        "rate_of_forward": round(sum(seconds["forward"]) / sum(seconds["index"]), 3),
        "rate_of_forward_per_chunk": [round(share, 3) for share in shares],
    }


def serve(latents: int, saes: int = 9, requests: int = 400) -> dict[str, Any]:
    """Milliseconds of a latent page's data, of a search, and of an SAE's table, through the whole application."""
    choose = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        words = _random_index(Path(folder), saes, latents)
        size = (Path(folder) / FILE).stat().st_size
        with TestClient(make_app(Index(folder)), base_url="http://127.0.0.1") as client:
            paths = {
                "latent": [
                    f"/api/latent/sae_{choose.randrange(saes)}/{choose.randrange(latents)}" for _ in range(requests)
                ],
                "search_token": [f"/api/search?q={choose.choice(words)}" for _ in range(requests)],
                "search_words": [
                    f"/api/search?q={choose.choice(words)} {choose.choice(words)[:3]}" for _ in range(requests)
                ],
                "table": [f"/api/sae/sae_{i % saes}" for i in range(20)],
            }
            found = {name: _timed(client, some) for name, some in paths.items()}
    return {"saes": saes, "latents": latents, "index_bytes": size, "milliseconds": found}


def _timed(client: TestClient, paths: list[str]) -> dict[str, float]:
    wall, cpu = [], []
    for path in paths:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        response = client.get(path)
        wall.append(1000 * (time.perf_counter() - begin))
        cpu.append(1000 * (time.process_time() - begin_cpu))
        assert response.status_code == 200, path
    return {
        f"{name}_p{share}": round(float(np.percentile(times, share)), 2)
        for name, times in (("wall", wall), ("cpu", cpu))
        for share in (50, 99)
    }


def _random_index(folder: Path, saes: int, latents: int) -> list[str]:
    """An index with the sizes of the real one and random content; returns its vocabulary."""
    choose = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = sorted({"".join(choose.choices(letters, k=choose.randint(3, 9))) for _ in range(50_000)})
    conversations, length = 2000, LENGTH
    random_ids = np.random.default_rng(0).integers(0, len(words), (conversations, length), dtype="<i4")
    with closing(sqlite3.connect(folder / FILE)) as database, database:
        database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + SCHEMA)
        database.executemany("INSERT INTO vocabulary VALUES (?, ?)", enumerate(f" {word}" for word in words))
        database.executemany(
            "INSERT INTO conversations VALUES (?, ?, 'bench', 'chat', ?, ?, ?)",
            ((i * length, f"{i:016x}", length, row.tobytes(), bytes(length)) for i, row in enumerate(random_ids)),
        )
        meta = {"version": VERSION, "privacy": {"scrub": True}}
        database.executemany(
            "INSERT INTO meta VALUES (?, ?)", [(key, json.dumps(value)) for key, value in meta.items()]
        )
        details = [pack(_random_detail(choose, len(words), conversations * length, latents)) for _ in range(512)]
        for ordinal in range(saes):
            peaks = [choose.choices(words, k=4) for _ in range(latents)]
            columns = {
                "density": [choose.random() * 0.01 for _ in range(latents)],
                "max": [choose.random() * 50 for _ in range(latents)],
                "mean": [choose.random() * 20 for _ in range(latents)],
                "role": [choose.randrange(7) for _ in range(latents)],
                "peaks": peaks,
                "promoted": [choose.choices(words, k=3) for _ in range(latents)],
            }
            summary = json.dumps({"dict_size": latents})
            database.execute(
                "INSERT INTO saes VALUES (?, ?, ?, ?)", (ordinal, f"sae_{ordinal}", summary, pack(columns))
            )
            keys = [key_of(ordinal, latent) for latent in range(latents)]
            database.executemany(
                "INSERT INTO latents VALUES (?, 0.01, ?)", ((key, choose.choice(details)) for key in keys)
            )
            database.executemany(
                "INSERT INTO search (rowid, label, peaks, promoted, context) VALUES (?, '', ?, ?, ?)",
                (
                    (
                        key,
                        "\x1f".join(some),
                        "\x1f".join(choose.choices(words, k=12)),
                        " ".join(choose.choices(words, k=52)),
                    )
                    for key, some in zip(keys, peaks, strict=True)
                ),
            )
            database.executemany(
                "INSERT INTO peaks VALUES (?, 0.3, ?)",
                ((word, key) for key, some in zip(keys, peaks, strict=True) for word in some),
            )
        database.execute("CREATE INDEX peaks_by_token ON peaks (token, share DESC)")
    return words


def _random_detail(choose: random.Random, words: int, tokens: int, latents: int) -> dict[str, Any]:
    ranking = lambda top, count: [[choose.randrange(top), round(choose.random() * 5, 3)] for _ in range(count)]  # noqa: E731
    kinds = ["top"] * 20 + ["75-100", "50-75", "25-50", "0-25"] * 4 + ["negative"] * 10
    places = lambda: sorted(choose.sample(range(48), 8))  # noqa: E731
    address = lambda: choose.randrange(tokens // LENGTH) * LENGTH + choose.randrange(32, LENGTH - 32)  # noqa: E731
    return {
        "fired": 5000,
        "density": 0.01,
        "mean": 3.0,
        "max": 20.0,
        "histogram": {"first": -1.0, "per_octave": 4, "counts": [choose.randrange(500) for _ in range(30)]},
        "splits": [4000, 1000],
        "roles": [choose.randrange(1000) for _ in range(7)],
        "promoted": ranking(words, 12),
        "suppressed": ranking(words, 12),
        "neighbours": ranking(latents, 10),
        "elsewhere": [[f"sae_{i}", choose.randrange(latents), 0.5] for i in range(8)],
        "coactive": [[*pair, 40] for pair in ranking(latents, 10)],
        "experts": [[e, 0.3, 0.1] for e in range(8)],
        "examples": [[kind, address(), places(), [round(choose.random() * 20, 2) for _ in range(8)]] for kind in kinds],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rate", "serve"])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--latents", type=int, default=16_384)
    chosen = parser.parse_args()
    print(json.dumps(rate(chosen.tokens) if chosen.what == "rate" else serve(chosen.latents), indent=2))
