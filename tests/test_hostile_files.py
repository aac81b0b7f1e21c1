"""Random and mutated bytes in every text file that is read: success, or one line that can be shown."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenscope.checksums import CHECKSUMS_FILE, read_checksums, verify_folder, write_checksums
from qwenscope.files import read_json
from qwenscope.recipe import keys, load_recipe
from qwenscope.release.facts import public_run
from qwenscope.release.parquet import write_training
from qwenscope.training.telemetry import MetricsFile

RECIPE = load_recipe("standin").to_yaml().encode()
RUN = json.dumps(
    {"sessions": [{"started": "2026", "pid": 1}], "seed": 1, "revisions": {"model": None}, "machine": {"devices": []}}
).encode()
LINE = {"step": 1, "tokens": 10, "saes": {"a": {"fvu": 0.5, "l0": 4}}, "left_out": {"outlier": 0}, "seconds": 0.1}
METRICS = b"".join(json.dumps(LINE | {"step": step}).encode() + b"\n" for step in range(1, 4))


def mutated(sound: bytes, seed: int) -> bytes:
    """A few changes: flipped bits, pieces cut out, doubled, swapped for other pieces or for hostile words."""
    draw = random.Random(seed)
    words = [b"\x00", b"\xff", b"\xed\xa0\x80", b"&a *a", b"[" * 200, b"{", b"9" * 5000, b"1e999", b"NaN", b"!!bool x"]
    words += [b"2024-99-99", b"\x1b[31m", b"\n", b": ", b"- ", b'"', b"null", b"true", b"-1", b"1e18", b"<<: ", b"../x"]
    data = bytearray(sound)
    for _ in range(draw.randint(1, 4)):
        a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + 40)
        match draw.randrange(5):
            case 0 if data:
                data[min(a, len(data) - 1)] ^= 1 << draw.randrange(8)
            case 1:
                del data[a:b]
            case 2:
                data[a:a] = data[a:b]
            case 3:
                data[a:b] = draw.choice(words)
            case _:
                data[a:a] = draw.choice(words)
    return bytes(data)


def read_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


def read_run(path: Path) -> None:
    record = read_json(path)
    if isinstance(record, dict):
        public_run(record)


def read_sums(path: Path) -> None:
    if path.name != CHECKSUMS_FILE:
        path = path.rename(path.with_name(CHECKSUMS_FILE))
    read_checksums(path.parent)
    verify_folder(path.parent)


def read_metrics(path: Path) -> None:
    write_training(path, path.with_name("metrics.parquet"))


def resume_metrics(path: Path) -> None:
    file = MetricsFile(path, 2)
    file.append(LINE)
    file.flush()
    file.close()
    assert json.loads(path.read_bytes().splitlines()[-1]) == LINE


def sums(folder: Path) -> bytes:
    (folder / "a.txt").write_text("a")
    write_checksums(folder)
    return (folder / CHECKSUMS_FILE).read_bytes()


READERS: dict[str, tuple[Callable[[Path], Any], bytes | Callable[[Path], bytes]]] = {
    "recipe": (read_recipe, RECIPE),
    "run.json": (read_run, RUN),
    "SHA256SUMS": (read_sums, sums),
    "metrics.jsonl": (read_metrics, METRICS),
    "metrics.jsonl, resumed": (resume_metrics, METRICS),
}
quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def attack(name: str, folder: Path, data: bytes | int) -> None:
    read, sound = READERS[name]
    sound = sound(folder) if callable(sound) else sound
    path = folder / ("x.yaml" if name == "recipe" else "x")
    path.write_bytes(mutated(sound, data) if isinstance(data, int) else data)
    refusal(lambda: read(path))


@pytest.mark.parametrize("name", READERS)
@settings(quick, max_examples=60)
@given(data=st.binary(max_size=200) | st.integers(0, 2**32))
def test_bytes_are_read_or_refused(name: str, data: bytes | int, tmp_path: Path) -> None:
    attack(name, tmp_path, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@settings(quick, max_examples=2000)
@given(data=st.binary(max_size=400) | st.integers(0, 2**32))
def test_two_thousand_bytes_are_read_or_refused(name: str, data: bytes | int, tmp_path: Path) -> None:
    attack(name, tmp_path, data)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
key = st.sampled_from([name.replace("<id>", "sae_attn_mid").replace("<n>", "0") for name in keys()])
overrides = st.tuples(key | st.text(max_size=20), values.map(json.dumps) | st.text(max_size=20)).map("=".join)


@settings(quick, max_examples=60)
@given(st.lists(overrides | st.text(max_size=20), max_size=2))
def test_overrides_are_taken_or_refused(given_overrides: list[str]) -> None:
    refusal(lambda: load_recipe("standin", given_overrides))


@pytest.mark.slow
@settings(quick, max_examples=2000)
@given(st.lists(overrides | st.text(max_size=20), max_size=3))
def test_two_thousand_overrides_are_taken_or_refused(given_overrides: list[str]) -> None:
    refusal(lambda: load_recipe("standin", given_overrides))


@pytest.mark.parametrize("listed", ["a\0b", "x" * 5000, "circle/x", "../outside", "/etc/passwd", "a" * 300])
def test_a_listed_name_that_no_file_has_is_named(listed: str, tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / CHECKSUMS_FILE).write_text(f"{'0' * 64}  {listed}\n")
    assert "is listed in SHA256SUMS and missing" in str(refusal(lambda: verify_folder(tmp_path)))
