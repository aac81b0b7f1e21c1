"""Benchmarks of the feature index and its browser; each prints one JSON object.

    python bench/features.py rate [--tokens 100000]       index build beside the bare forward pass, on the stand-in
    python bench/features.py serve [--latents 16384]      latency of pages and search, nine SAEs of random content
    python bench/features.py paint [--latents 16384]      first paint in headless Chromium, cold cache, the same content

`rate` counts CPU seconds of this process; `serve` the wall clock and CPU; `paint` the browser's own clock, from the
start of the navigation.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from features_content import random_index
from playwright.sync_api import Browser, sync_playwright
from starlette.testclient import TestClient

from qwenscope.activations.harvest import harvest
from qwenscope.features.browser.server import make_app
from qwenscope.features.corpus_pass import CorpusPass
from qwenscope.features.index import _finish
from qwenscope.features.integrity import FILE
from qwenscope.features.store import Index
from qwenscope.lm.load import load_language_model
from qwenscope.lm.sites import sites_of
from qwenscope.opening import Target
from qwenscope.recipe import load_recipe
from qwenscope.sae.sae import TopKSAE

ROUTES = {"suite": "#/", "sae": "#/sae/sae_attn_mid", "latent": "#/sae/sae_attn_mid/40"}
WHEN_READY = """
new MutationObserver(() => { if (document.querySelector("main[data-ready]")) window.readyAt ??= performance.now(); })
    .observe(document, { subtree: true, childList: true, attributes: true });
"""
PAINTED = """
new Promise((found) => new PerformanceObserver((list) => {
    const paint = list.getEntriesByName("first-contentful-paint")[0];
    if (paint) found([paint.startTime, window.readyAt]);
}).observe({ type: "paint", buffered: true }))
"""


def rate(tokens: int) -> dict[str, Any]:
    """CPU seconds of reading the corpus, of indexing each chunk, and of the bare forward pass over the same chunk.

    `describe` is what follows once, however many tokens were read: pages, map, logit histograms, search, files.
    """
    recipe = load_recipe("standin")
    saes = {name: TopKSAE(64, point.dict_size, point.k, seed=point.layer) for name, point in recipe.hook_points.items()}
    lm = load_language_model(recipe.lm, last_layer=recipe.last_layer, lm_head=True)
    seconds: dict[str, list[float]] = {"corpus": [], "index": [], "forward": []}
    with tempfile.TemporaryDirectory() as folder:
        target = Target(folder, Path(folder), recipe, saes, {})
        out = Path(folder) / "index"
        (work := out / ".work").mkdir(parents=True)
        corpus_pass = CorpusPass(target, lm, None, tokens, work)
        with target.conversations(lm.tokenizer) as stream:
            while corpus_pass.read < tokens:
                marks = [time.process_time()]
                conversations = corpus_pass._next_chunk(stream)
                marks.append(time.process_time())
                corpus_pass._add(conversations)
                marks.append(time.process_time())
                harvest(lm, conversations, sites_of(recipe), recipe.activations, recipe.corpus.batch_tokens)
                marks.append(time.process_time())
                for name, taken in zip(("corpus", "index", "forward"), np.diff(marks), strict=True):
                    seconds[name].append(float(taken))
        begin = time.process_time()
        _finish(corpus_pass, out, work, lambda *_: None)
        seconds["describe"] = [time.process_time() - begin]
    shares = [forward / index for forward, index in zip(seconds["forward"], seconds["index"], strict=True)]
    return {
        "tokens": corpus_pass.read,
        "latents": sum(sae.dict_size for sae in saes.values()),
        "cpu_seconds": {name: round(sum(spent), 2) for name, spent in seconds.items()},
        "rate_of_forward": round(sum(seconds["forward"]) / sum(seconds["index"]), 3),
        "rate_of_forward_per_chunk": [round(share, 3) for share in shares],
    }


def serve(latents: int, requests: int = 400) -> dict[str, Any]:
    """Milliseconds of a latent page's data, of a search, and of an SAE's table, through the whole application."""
    choose = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        words = random_index(Path(folder), latents)
        index = Index(folder)
        ids = list(index.saes)
        some = lambda: choose.choice(words)  # noqa: E731
        paths = {
            "latent": [f"/api/latent/{choose.choice(ids)}/{choose.randrange(latents)}" for _ in range(requests)],
            "search_token": [f"/api/search?q={some()}" for _ in range(requests)],
            "search_words": [f"/api/search?q={some()} {some()[:3]}" for _ in range(requests)],
            "table": [f"/api/sae/{ids[i % len(ids)]}" for i in range(20)],
        }
        with TestClient(make_app(index), base_url="http://127.0.0.1") as client:
            found = {name: _timed(client, some) for name, some in paths.items()}
        size = (Path(folder) / FILE).stat().st_size
    return {"saes": len(ids), "latents": latents, "index_bytes": size, "milliseconds": found}


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


def paint(latents: int, visits: int = 10) -> dict[str, Any]:
    """Milliseconds from the start of a navigation to the first contentful paint, and until the view stands whole.

    The server is `qwenscope browse` in a process of its own; each visit has a browser context, and so a cache, of its
    own.
    """
    with tempfile.TemporaryDirectory() as folder:
        random_index(Path(folder), latents)
        with browse(Path(folder)) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            found = {
                page: _summed([_visit(browser, address + route) for _ in range(visits)])
                for page, route in ROUTES.items()
            }
            name = browser.version
            browser.close()
    return {"latents": latents, "visits": visits, "chromium": name, "milliseconds": found}


@contextmanager
def browse(index: Path) -> Iterator[str]:
    """The address of `qwenscope browse` on a free port."""
    command = [sys.executable, "-m", "qwenscope", "browse", str(index), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield process.stderr.readline().split()[0]
        finally:
            process.terminate()


def _visit(browser: Browser, address: str) -> tuple[float, float]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(WHEN_READY)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("main[data-ready] h1")
    times = page.evaluate(PAINTED)
    context.close()
    return times[0], times[1]


def _summed(visits: list[tuple[float, float]]) -> dict[str, float]:
    return {
        f"{name}_{kind}": round(of(times), 1)
        for name, times in zip(("first_paint", "whole_view"), zip(*visits, strict=True), strict=True)
        for kind, of in (("median", statistics.median), ("max", max))
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rate", "serve", "paint"])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--latents", type=int, default=16_384)
    chosen = parser.parse_args()
    result = (
        rate(chosen.tokens) if chosen.what == "rate" else {"serve": serve, "paint": paint}[chosen.what](chosen.latents)
    )
    print(json.dumps(result, indent=2))
