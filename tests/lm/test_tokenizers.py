"""Tokenizers as they lie beside checkpoints: with code that must not run, with leftovers of training, or damaged."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qwenscope.corpus.chat import render
from qwenscope.lm.load import load_tokenizer
from qwenscope.lm.standin import STANDIN_FOLDER
from qwenscope.recipe import LMRecipe

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
QUESTION = [{"role": "user", "content": "What is it, and why? " * 20}, {"role": "assistant", "content": "It is."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        if (STANDIN_FOLDER / name).is_file():
            shutil.copyfile(STANDIN_FOLDER / name, tmp_path / name)
    return tmp_path


def load(folder: Path) -> Any:
    return load_tokenizer(LMRecipe(model=str(folder)))


@pytest.mark.parametrize("named", ["tokenizer_class", "auto_map", "both"])
def test_code_of_the_checkpoint_is_neither_asked_for_nor_run(
    folder: Path, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = os.open(os.devnull, os.O_RDONLY)
    monkeypatch.setattr(sys, "stdin", os.fdopen(answers))
    path = folder / "tokenizer_config.json"
    extra: dict[str, Any] = {"tokenizer_class": "XTokenizer"} if named != "auto_map" else {}
    if named != "tokenizer_class":
        extra["auto_map"] = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    (folder / "tokenization_x.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        "Path(__file__).with_name('RAN').touch()\nclass XTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    said = refusal(lambda: load(folder))
    assert said is None or "the tokenizer of" in said
    assert not (folder / "RAN").exists()
    assert "[y/N]" not in capsys.readouterr().out


@pytest.mark.parametrize("longest", ["x", 3, -1, 1e30, []])
def test_a_longest_length_that_was_saved_changes_nothing(folder: Path, longest: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": longest}))
    expected = render(QUESTION, None, AutoTokenizer.from_pretrained(STANDIN_FOLDER), 1000)
    assert np.array_equal(render(QUESTION, None, load(folder), 1000).token_ids, expected.token_ids)


@pytest.mark.parametrize("direction", ["left", "right"])
@pytest.mark.parametrize("kind", ["truncation", "padding", "fixed padding", "both"])
def test_truncation_and_padding_that_were_saved_change_nothing(folder: Path, kind: str, direction: str) -> None:
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    if kind in ("truncation", "both"):
        saved["truncation"] = {"direction": direction.title(), "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    if kind != "truncation":
        strategy: Any = {"Fixed": 64} if kind == "fixed padding" else "BatchLongest"
        saved["padding"] = {
            "strategy": strategy,
            "direction": direction.title(),
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        }
    path.write_text(json.dumps(saved))
    expected = render(QUESTION, None, AutoTokenizer.from_pretrained(STANDIN_FOLDER), 1000)
    raw = AutoTokenizer.from_pretrained(folder)  # as a user may hand it over
    for tokenizer in (load(folder), raw):
        found = render(QUESTION, None, tokenizer, 1000)
        assert np.array_equal(found.token_ids, expected.token_ids)
        assert np.array_equal(found.roles, expected.roles)
        assert not found.truncated


def test_dropout_that_was_saved_changes_nothing(folder: Path) -> None:
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["model"]["dropout"] = 0.9
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = load(folder)
    text = QUESTION[0]["content"]
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(STANDIN_FOLDER).encode(text)


def test_a_tokenizer_without_its_vocabulary_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "has no vocabulary; fetch its tokenizer.json again" in str(refusal(lambda: load(folder)))


def test_a_call_with_padding_and_truncation_leaves_nothing_behind() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STANDIN_FOLDER)
    expected = render(QUESTION, None, tokenizer, 1000).token_ids
    tokenizer("hello", padding="max_length", max_length=5, truncation=True)
    assert np.array_equal(render(QUESTION, None, tokenizer, 1000).token_ids, expected)


json_values = st.none() | st.booleans() | st.integers(-2, 2**40) | st.text(max_size=6) | st.just([]) | st.just({})


def damaged(data: st.DataObject, folder: Path) -> None:
    """Change one of a tokenizer's files: bytes, or a value of its JSON."""
    name = data.draw(st.sampled_from([name for name in FILES[1:] if (folder / name).is_file()]))
    raw = bytearray((folder / name).read_bytes())
    how = data.draw(st.sampled_from(["flip", "cut", "random", "value"]))
    if how == "value" and name.endswith(".json"):
        tree = json.loads(raw)
        node, key = tree, data.draw(st.sampled_from(sorted(tree)))
        while isinstance(node[key], dict) and node[key] and data.draw(st.booleans()):
            node = node[key]
            key = data.draw(st.sampled_from(sorted(node)[:40]))
        node[key] = data.draw(json_values)
        raw = bytearray(json.dumps(tree).encode())
    elif how == "random":
        raw = bytearray(data.draw(st.binary(max_size=60)))
    elif how == "cut":
        del raw[data.draw(st.integers(0, len(raw))) :]
    else:
        raw[data.draw(st.integers(0, min(len(raw), 4000) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(raw)


def check_damage(data: st.DataObject, folder: Path) -> None:
    for name in FILES:
        if (STANDIN_FOLDER / name).is_file():
            shutil.copyfile(STANDIN_FOLDER / name, folder / name)
    damaged(data, folder)
    refusal(lambda: render(QUESTION, None, load(folder), 100))


fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@settings(fuzz, max_examples=40)
@given(data=st.data())
def test_a_damaged_tokenizer_is_refused_or_read(data: st.DataObject, folder: Path) -> None:
    check_damage(data, folder)


@pytest.mark.slow
@settings(fuzz, max_examples=2000)
@given(data=st.data())
def test_two_thousand_damaged_tokenizers_are_refused_or_read(data: st.DataObject, folder: Path) -> None:
    check_damage(data, folder)
