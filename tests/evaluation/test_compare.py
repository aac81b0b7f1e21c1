"""Comparing suites: the figures are the evaluation's own, a suite equals itself, latents are matched by brute force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_language_model, make_suite

from qwenscope import TopKSAE, evaluate
from qwenscope.errors import FormatError
from qwenscope.evaluation.compare import compare, matched_latents

LAYERS = {"sae_delta": 1, "sae_attn": 3}


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("suites")
    model = make_language_model(folder / "model")
    return make_suite(folder / "one", model, 1), make_suite(folder / "two", model, 2)


@pytest.fixture(scope="module")
def compared(suites: tuple[Path, Path]) -> dict[str, Any]:
    return compare(*suites, tokens=600)


def test_figures_are_those_of_the_evaluation(suites: tuple[Path, Path], compared: dict[str, Any]) -> None:
    assert [(pair["first"], pair["second"], pair["layer"]) for pair in compared["pairs"]] == [
        ("sae_delta", "sae_delta", 1),
        ("sae_attn", "sae_attn", 3),
    ]
    for side, folder in zip(("first", "second"), suites, strict=True):
        alone = evaluate(folder, tokens=600)["saes"]
        for pair in compared["pairs"]:
            for split, cell in pair["splits"].items():
                for key, value in cell[side].items():
                    assert value == pytest.approx(alone[pair[side]][split][key], rel=1e-9)
    for pair in compared["pairs"]:
        for cell in pair["splits"].values():
            difference = cell["differences"]["fvu"]
            assert difference["difference"] == pytest.approx(cell["second"]["fvu"] - cell["first"]["fvu"], abs=1e-9)
            assert difference["interval"][0] <= difference["difference"] <= difference["interval"][1]
    json.dumps(compared, allow_nan=False)


def test_a_suite_equals_itself(suites: tuple[Path, Path]) -> None:
    for pair in compare(suites[0], suites[0] / "saes", tokens=300)["pairs"]:
        for cell in pair["splits"].values():
            assert cell["first"] == cell["second"]
            assert all(found["difference"] == 0 for found in cell["differences"].values())
        matched = pair["latents"]["matched"]
        assert matched["mutual"] == pair["sizes"]["first"][0]
        assert matched["mean_cosine"] == pytest.approx(1)


def test_latents_are_matched_as_by_brute_force() -> None:
    a, b = TopKSAE(8, 50, 4, seed=1), TopKSAE(8, 70, 4, seed=2)
    cosine = (a.decoder.weight.T @ b.decoder.weight).detach()
    mutual = [
        (i, j, cosine[i, j].item())
        for i in range(50)
        for j in range(70)
        if cosine[i].argmax() == j and cosine[:, j].argmax() == i
    ]
    found = matched_latents(a, b)
    assert found["mutual"] == len(mutual)
    assert found["mean_cosine"] == pytest.approx(sum(c for _, _, c in mutual) / len(mutual))
    best = sorted(mutual, key=lambda match: -match[2])[:20]
    assert [(i, j) for i, j, _ in found["best"]] == [(i, j) for i, j, _ in best]


def test_what_cannot_be_compared_is_refused_by_name(suites: tuple[Path, Path], tmp_path: Path) -> None:
    sae = TopKSAE(32, 64, 4, seed=1)
    sae.save(tmp_path / "nameless/sae_x")
    with pytest.raises(FormatError, match=r"sae_x/config.json does not say its layer"):
        compare(suites[0], tmp_path / "nameless")
    sae.config["layer"] = 2
    sae.save(tmp_path / "elsewhere/sae_x")
    with pytest.raises(FormatError, match=r"no site is in both suites: .* has layers.1, layers.3, .* has layers.2"):
        compare(suites[0], tmp_path / "elsewhere")
    wide = TopKSAE(48, 64, 4, seed=1)
    wide.config["layer"] = 1
    wide.save(tmp_path / "wide/sae_x")
    with pytest.raises(FormatError, match="sae_x has hidden_dim 48"):
        compare(suites[0], tmp_path / "wide")
