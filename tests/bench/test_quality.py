"""Comparing quality: rows of a model are harvested once, and a comparison that was interrupted goes on."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from quality import Runs, Trained, splice
from quality_data import Data, model_rows
from quality_table import markdown
from tiny_run import make_language_model, tiny_recipe

from qwenscope.files import read_object
from qwenscope.lm.sites import Site
from qwenscope.recipe import LMRecipe, Recipe
from qwenscope.sae.sae import TopKSAE

SITES = [Site("layers.1.mid"), Site("layers.1.mlp_out"), Site("layers.1")]
ROWS, HELD_OUT = 1300, 200


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_recipe(make_language_model(tmp_path_factory.mktemp("lm")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def data(recipe: Recipe, folder: Path) -> list[Data]:
    return list(model_rows(recipe, SITES, ROWS, HELD_OUT, folder))


def test_rows_of_all_sites_are_the_same_tokens_and_none_is_trained_on_and_held_out(data: list[Data]) -> None:
    assert [each.name for each in data] == [site.name for site in SITES]
    for part, count in (("train_RD", ROWS), ("held_out_RD", HELD_OUT)):
        mid_RD, mlp_RD, stream_RD = (getattr(each, part) for each in data)
        assert len(stream_RD) == count
        assert torch.allclose(mid_RD + mlp_RD, stream_RD, atol=1e-5)
    trained = {row.numpy().tobytes() for row in data[2].train_RD}
    assert len(trained) > ROWS / 2
    shared = sum(row.numpy().tobytes() in trained for row in data[2].held_out_RD)
    assert shared <= HELD_OUT / 4  # beginnings that generated conversations have in common


def test_kept_rows_need_no_model(data: list[Data], recipe: Recipe, folder: Path) -> None:
    gone = recipe.model_copy(update={"lm": LMRecipe(model="nowhere")})
    again = list(model_rows(gone, SITES, ROWS, HELD_OUT, folder))
    assert all(torch.equal(a.train_RD, b.train_RD) for a, b in zip(data, again, strict=True))


def test_what_was_trained_and_spliced_is_not_done_again(data: list[Data], tmp_path: Path) -> None:
    trained: list[tuple[float | None, int]] = []

    def train(lr: float | None, seed: int) -> Trained:
        trained.append((lr, seed))
        sae = TopKSAE(32, 64, 4, seed=seed)
        with torch.no_grad():
            sae.encoder.weight.mul_(lr or 1e-3)  # so that the larger rate comes out better
        return sae, 1.5

    options = argparse.Namespace(seeds=2, rate=[0.1, 0.3], tuned_only=True)
    tables = []
    for _ in range(2):
        runs = Runs(tmp_path / "ours", data[2], train, options)
        places = runs.final()
        splice(places, data[2])
        tables.append(markdown({"layers.1": {"ours": runs.result()}}))
    assert trained == [(0.1, 0), (0.3, 0), (0.3, 1)]
    assert [place.name for place in places] == ["0.3-0", "0.3-1"]
    assert read_object(places[0] / "spliced.json")["kl"] > 0
    assert tables[0] == tables[1]
    head, _, row = tables[0].splitlines()[2:]
    assert dict(zip(head.split(" | "), row.split(" | "), strict=True))["CPU s |"] == "2 |"
