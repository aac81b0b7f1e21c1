"""The table of usefulness: SAEs of one site are seeds of one, and spreads of both kinds of seeds count."""

from __future__ import annotations

from typing import Any

import pytest
from usefulness import probing, sites, table


def figures(trained: float, frozen: float, paired: float) -> dict[str, Any]:
    def cell(value: float) -> dict[str, Any]:
        return {"auroc": value, "share": value, "std": 0.01, "families": {"role": {"auroc": value, "std": 0.01}}}

    both = {"latents": trained, "frozen decoder": frozen}
    return {
        "probing": {name: {k: cell(value) for k in ("1", "4", "16")} for name, value in both.items()},
        "above_frozen_decoder": {k: {"std": paired} for k in ("1", "4", "16")},
        "absorption": {name: {"absorbed": cell(value)} for name, value in both.items()},
        "dense_latents": 2,
    }


def evaluation(**trained: float) -> dict[str, Any]:
    return {
        "hook_points": {name: {"layer": 3, "dict_size": 64, "k": 4} for name in trained},
        "usefulness": {"saes": {name: figures(value, 0.5, 0.03) for name, value in trained.items()}},
    }


def test_deviations_are_of_both_kinds_of_seeds() -> None:
    (saes,) = sites([evaluation(a=0.7, b=0.78), evaluation(a=0.74)]).values()
    score = probing(saes, "1")
    assert (score.trained, score.frozen) == (pytest.approx(0.74), pytest.approx(0.5))
    assert score.deviations == pytest.approx(0.24 / (0.04**2 + 0.03**2) ** 0.5)  # of 0.7, 0.74, 0.78, and paired
    assert probing(saes, "1", "role").deviations == pytest.approx(0.24 / (0.04**2 + 2 * 0.01**2) ** 0.5)


def test_more_absorption_counts_against_an_sae() -> None:
    _, _, row = table([evaluation(a=0.7, b=0.78, c=0.74)]).splitlines()
    site, *scores, absorbed, dense = row.strip("| ").split(" | ")
    assert site == "layers.3, n 64, k 4"
    assert scores == ["0.740 / 0.500, +4.8"] * 3
    assert absorbed == "0.740 / 0.500, -5.7"
    assert dense == "2"
