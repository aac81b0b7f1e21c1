"""Whole runs with and without the cache: the same metrics, and every SAE to the same sha256."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import make_language_model, make_reference, tiny_recipe

from qwenscope.errors import FormatError
from qwenscope.training.run import train


def test_writer_and_reader_of_a_cache_end_like_a_run_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_language_model(tmp_path / "lm")
    reference = make_reference(model, tmp_path / "plain")
    cached = tiny_recipe(model, activations__cache=str(tmp_path / "cache"))
    train(cached, tmp_path / "writer")
    reference.check(tmp_path / "writer")

    def refuse(*_: object) -> None:
        raise AssertionError("harvested although the cache is whole")

    monkeypatch.setattr("qwenscope.activations.source.harvest", refuse)
    train(cached, tmp_path / "reader")
    reference.check(tmp_path / "reader")

    # another suite of SAEs on the same rows needs no harvest either; a damaged window stops it with its name
    other = tiny_recipe(model, activations__cache=str(tmp_path / "cache"), hook_points__sae_attn__k=5)
    train(other, tmp_path / "sweep")
    victim = sorted((tmp_path / "cache").rglob("layer-03.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0")
    with pytest.raises(FormatError, match=rf"{victim} is damaged"):
        train(other, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "saes").exists()
