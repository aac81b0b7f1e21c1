"""`config.json` of a downloaded SAE: validated where it is read; no writer leaves its folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from exact_saes import exact_sae

from qwenscope import SAE
from qwenscope.errors import FormatError
from qwenscope.sae.files import check_config, join_below, read_config
from qwenscope.sae.formats import EXPORTS, export_suite

GOOD: dict[str, Any] = {"hidden_dim": 16, "dict_size": 64, "k": 6, "layer": 7, "model": "org/name", "kind": "deltanet"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"layer": "../../x"}, "layer must be a whole number"),
        ({"layer": -1}, "layer must be a whole number"),
        ({"layer": True}, "layer must be a whole number"),
        ({"sae_id": "../up"}, "is not an SAE id"),
        ({"sae_id": "/etc/passwd"}, "is not an SAE id"),
        ({"site": "layers/22"}, "site must be names joined by dots"),
        ({"site": "layers..22"}, "site must be names joined by dots"),
        ({"model": ["a"]}, "model must be a line of text"),
        ({"model": "a\nb"}, "model must be a line of text"),
        ({"kind": 3}, "kind must be a line of text"),
        ({"activation": "gated"}, "activation 'gated' is unknown"),
        ({"activation": None, "k": 65}, "k 65 exceeds"),
        ({"k": 1.0}, "k must be a whole number"),
        ({"dict_size": 1 << 40}, "dict_size must be a whole number"),
        ({"note": float("nan")}, "holds what JSON cannot"),
        ({"note": "\ud800"}, "holds what JSON cannot"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    exact_sae().save(tmp_path / "sae")
    (tmp_path / "sae/config.json").write_text(json.dumps(GOOD | changes))
    with pytest.raises(FormatError, match=complaint) as caught:
        SAE.from_pretrained(tmp_path / "sae")
    assert len(str(caught.value).splitlines()) == 1


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 6, 2**31, 2**70, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "..",
    "../../x", "/abs", "a/b", "a\\b", "C:\\x", "\x00", "\x1b[31m", "\ud800", "a" * 5000, [], [1], {}, {"a": [None]},
    "nul", "topk", "relu", "jumprelu", "batch_topk",
]  # fmt: skip


def test_mutated_configurations_are_refused_or_usable(tmp_path: Path) -> None:
    """Whatever a key holds: one line of FormatError, or a configuration with which every export stays in its folder."""
    draw = random.Random(1)
    keys = [*GOOD, "sae_id", "site", "activation", "tokens", "model_revision", "hook_name", "new"]
    exact_sae().save(tmp_path / "sae")
    accepted = 0
    for number in range(2000):
        config: Any = GOOD | {draw.choice(keys): draw.choice(VALUES) for _ in range(draw.randint(1, 3))}
        if number % 50 == 0:
            config = draw.choice(VALUES)
        path = tmp_path / "config.json"
        text = json.dumps(config)
        if number % 7 == 0:
            place = draw.randrange(len(text))
            text = text[:place] + chr(draw.randrange(1, 0x2000)) + text[place + 1 :]
        path.write_text(text, encoding="utf-8")
        try:
            found = read_config(path)
        except FormatError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017 (either outcome is right)
            continue
        assert check_config(path, found) == {
            key: value for key, value in found.items() if (key, value) != ("model", None)
        }
        accepted += 1
        if accepted % 10 == 0 and found.get("activation", "topk") == "topk":
            (tmp_path / "sae/config.json").write_text(json.dumps(found))
            assert exports_stay_inside(tmp_path, f"out-{number}")
    assert 100 < accepted < 1900


def exports_stay_inside(folder: Path, name: str) -> bool:
    before = {path for path in folder.rglob("*") if name not in path.parts}
    for to in EXPORTS:
        try:
            export_suite(folder / "sae", to, folder / name / to)
        except FormatError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017 (either outcome is right)
    return before == {path for path in folder.rglob("*") if name not in path.parts}


@pytest.mark.parametrize("name", ["..", ".", "", "/x", "a/b", "a\\b", ".hidden", "a\x00", "x" * 300])
def test_no_name_leads_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="cannot be the name of a file or folder"):
        join_below(tmp_path, "v1", name)


def test_neuronpedia_refuses_a_model_without_a_name(tmp_path: Path) -> None:
    exact_sae(model="org/..", layer=3).save(tmp_path / "sae")
    with pytest.raises(FormatError, match="cannot be the name"):
        export_suite(tmp_path / "sae", "neuronpedia", tmp_path / "out")
    assert not (tmp_path / "out").exists()
