"""The cache: the same batches bit for bit without the language model, and no damaged byte unnoticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from activations.conftest import LAYERS, ListStream, conversation
from damage import damaged
from torch import Tensor

from qwenscope.activations.cache import WindowCache, _Files, cache_bytes
from qwenscope.activations.windows import Windows
from qwenscope.errors import FormatError, ResourceError
from qwenscope.lm.model import LanguageModel
from qwenscope.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
CORPUS = [conversation(i, 3 + (i * 7) % 40) for i in range(50)]


def batches(lm: LanguageModel, recipe: Recipe, count: int = 12, corpus: Any = CORPUS) -> list[dict[int, Tensor]]:
    with closing(Windows(lm, ListStream(corpus), recipe)) as source:
        return [source.next_batch(100) for _ in range(count)]


def equal(left: list[dict[int, Tensor]], right: list[dict[int, Tensor]]) -> bool:
    return all(torch.equal(a[layer], b[layer]) for a, b in zip(left, right, strict=True) for layer in LAYERS)


@pytest.fixture
def no_harvest(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on any harvest fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("harvested again")

    return lambda: monkeypatch.setattr("qwenscope.activations.source.harvest", refuse)


def test_a_run_from_cache_gives_the_same_batches(
    lm: LanguageModel, recipe: MakeRecipe, tmp_path: Path, no_harvest: Callable[[], None]
) -> None:
    plain = batches(lm, recipe())
    cached = recipe(cache=str(tmp_path / "cache"))
    assert equal(batches(lm, cached), plain)
    no_harvest()
    again = Windows(lm, ListStream(CORPUS), cached)
    assert equal([again.next_batch(100) for _ in range(12)], plain)
    # counts, token ids and the corpus report come out as if it had been harvested
    harvested = Windows(lm, ListStream(CORPUS), cached)
    for _ in range(12):
        harvested.next_batch(100)
    assert (again.tokens_read, again.left_out, again.last_tokens()) == (
        harvested.tokens_read,
        harvested.left_out,
        harvested.last_tokens(),
    )
    assert again.report()["conversations"] == 50


def test_resume_from_cache(
    lm: LanguageModel, recipe: MakeRecipe, tmp_path: Path, no_harvest: Callable[[], None]
) -> None:
    cached = recipe(cache=str(tmp_path))
    source = Windows(lm, ListStream(CORPUS), cached)
    want = [source.next_batch(100) for _ in range(5)]
    state = json.loads(json.dumps(source.state()))
    want = [source.next_batch(100) for _ in range(4)]
    no_harvest()
    resumed = Windows(lm, ListStream(CORPUS), cached)
    resumed.restore(state)
    assert equal([resumed.next_batch(100) for _ in range(4)], want)


def test_a_half_written_cache_is_completed(lm: LanguageModel, recipe: MakeRecipe, tmp_path: Path) -> None:
    cached = recipe(cache=str(tmp_path))
    plain = batches(lm, recipe())
    batches(lm, cached, count=4)
    folders = sorted(tmp_path.glob("*/window-*"))
    (folders[-1] / "manifest.json").unlink()  # as if the writer had died before its last step
    assert equal(batches(lm, cached), plain)
    assert all((folder / "manifest.json").is_file() for folder in tmp_path.glob("*/window-*"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_any_fsspec_path(lm: LanguageModel, recipe: MakeRecipe, no_harvest: Callable[[], None]) -> None:
    plain = batches(lm, recipe())
    cached = recipe(cache="memory://bucket/cache")
    assert equal(batches(lm, cached), plain)
    files = fsspec.filesystem("memory").find("/bucket/cache")
    assert sum(file.endswith("manifest.json") for file in files) == 4
    no_harvest()
    assert equal(batches(lm, cached), plain)
    victim = next(file for file in files if file.endswith("layer-03.safetensors"))
    data = fsspec.filesystem("memory").cat_file(victim)
    fsspec.filesystem("memory").pipe_file(victim, data[:-1])
    with pytest.raises(FormatError, match=r"memory://bucket/cache/\w+/window-\d+/layer-03\.safetensors is damaged"):
        batches(lm, cached)


def test_every_flipped_bit_and_truncation_is_named(lm: LanguageModel, recipe: MakeRecipe, tmp_path: Path) -> None:
    cached = recipe(cache=str(tmp_path))
    batches(lm, cached, count=2)
    folder = next(tmp_path.glob("*/window-000000"))
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [
        "layer-02.safetensors",
        "layer-03.safetensors",
        "layer-05.safetensors",
        "manifest.json",
        "tokens.safetensors",
    ]
    for file in damaged(files, flips=300, truncations=30, seed=13):
        with pytest.raises(FormatError, match=f"{file} is damaged; delete its folder"):
            batches(lm, cached, count=1)
    (folder / "layer-05.safetensors").unlink()
    with pytest.raises(FormatError, match=r"layer-05\.safetensors is missing"):
        batches(lm, cached, count=1)


def test_a_newer_format_is_refused(lm: LanguageModel, recipe: MakeRecipe, tmp_path: Path, monkeypatch: Any) -> None:
    cached = recipe(cache=str(tmp_path))
    monkeypatch.setattr("qwenscope.activations.cache.VERSION", 2)
    batches(lm, cached, count=1)
    monkeypatch.undo()
    with pytest.raises(FormatError, match=r"manifest\.json has format version 2, this program reads 1"):
        batches(lm, cached, count=1)


def test_what_the_rows_depend_on_tells_caches_apart(
    lm: LanguageModel, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folders() -> int:
        return len(list(tmp_path.iterdir()))

    def open_store(wanted: Recipe) -> int:
        WindowCache(str(tmp_path), lm, wanted)
        return folders()

    assert open_store(recipe()) == 1
    assert open_store(recipe(batch_size=64, calibration_tokens=9)) == 1  # the SAEs' settings do not matter
    assert open_store(recipe(seed=1)) == 2
    assert open_store(recipe(outlier_factor=5.0)) == 3
    assert open_store(recipe(window_tokens=400)) == 4
    fewer = recipe()
    points = {name: point for name, point in fewer.hook_points.items() if point.layer != 3}
    assert open_store(fewer.model_copy(update={"hook_points": points})) == 5
    monkeypatch.setattr(lm, "revision", "other")
    assert open_store(recipe()) == 6
    monkeypatch.undo()
    weight = next(lm.layers[0].parameters())
    monkeypatch.setattr(weight, "data", weight.data + 1)
    assert open_store(recipe()) == 7


def test_a_changed_corpus_is_refused(lm: LanguageModel, recipe: MakeRecipe, tmp_path: Path) -> None:
    cached = recipe(cache=str(tmp_path))
    batches(lm, cached)
    stream = ListStream(CORPUS)
    next(stream)
    with pytest.raises(FormatError, match=r"window-000000 begins elsewhere in the corpus .* corpus\.sources changed"):
        Windows(lm, stream, cached).next_batch(100)


def test_size_is_known_beforehand(lm: LanguageModel, recipe: MakeRecipe, tmp_path: Path) -> None:
    assert cache_bytes(1, 9 * 2048, torch.bfloat16) == 36_872
    cached = recipe(cache=str(tmp_path), window_tokens=1000)
    batches(lm, cached, count=30)
    written = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    tokens = sum(len(c.token_ids) for c in CORPUS)
    assert written == pytest.approx(cache_bytes(tokens, len(LAYERS) * lm.hidden_dim, lm.dtype), rel=0.02)


def test_too_small_a_disk_is_refused_before_the_run(
    lm: LanguageModel, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = cache_bytes(1000, len(LAYERS) * lm.hidden_dim, lm.dtype)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(ResourceError, match=rf"activations\.cache needs {needed:,} more bytes in {tmp_path}"):
        Windows(lm, ListStream(CORPUS), recipe(cache=str(tmp_path)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    Windows(lm, ListStream(CORPUS), recipe(cache=str(tmp_path)))


def test_a_file_system_that_fails_is_one_line_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(url: str) -> None:
        raise RuntimeError(f"cannot reach {url}")

    monkeypatch.setattr("fsspec.core.url_to_fs", opened)
    with pytest.raises(ResourceError, match=r"activations\.cache memory://.*cannot be used") as caught:
        _Files("memory://alice:hunter2@host/x")
    assert "hunter2" not in str(caught.value)
