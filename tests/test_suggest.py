"""A recipe for any model: sizes that follow from its config, sites that are there, tokens that the data hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from lm.families import tiny

from qwenscope.errors import CorpusError, ModelError, RecipeError
from qwenscope.lm.standin import STANDIN_FOLDER
from qwenscope.planning.plan import plan
from qwenscope.planning.suggest import suggest
from qwenscope.recipe import Recipe, load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "docs" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny("llama").config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(STANDIN_FOLDER / name, folder / name)
    return folder


def test_both_kinds_of_layer_are_hooked_at_three_depths() -> None:
    recipe = load_recipe_text(suggest(str(STANDIN_FOLDER)))
    layers = [(point.layer, point.kind) for point in recipe.hook_points.values()]
    assert layers == [
        (10, "deltanet"), (11, "attention"), (19, "attention"), (20, "deltanet"), (30, "deltanet"), (31, "attention"),
    ]  # fmt: skip
    assert recipe.corpus.sources[0].name == "ultrachat"


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "gemma3n_text"])
def test_a_config_with_a_null_is_planned_or_refused_in_one_line(family: str, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    whole = json.loads(tiny(family).config.to_json_string(use_diff=False))
    planned, refused = 0, list[str]()
    for key in whole:
        (folder / "config.json").write_text(json.dumps({**whole, key: None}))
        try:
            plan(load_recipe_text(suggest(str(folder))), "h200", 1)
            planned += 1
        except ModelError as error:
            refused.append(str(error))
    assert planned > 10
    assert planned + len(refused) == len(whole)


def test_a_config_of_a_billion_layers_is_damaged(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(ModelError, match="1,000,000,000 layers or experts; it is damaged"):
        suggest(str(tmp_path / "model"))


def load_recipe_text(text: str) -> Recipe:
    return Recipe.model_validate(yaml.safe_load(text))


def test_sites_and_sizes_may_be_chosen(llama: Path) -> None:
    recipe = load_recipe_text(suggest(str(llama), sites=["2", "layers.1.mlp"], dict_size=96))
    assert {name: point.site for name, point in recipe.hook_points.items()} == {
        "layer_2": "layers.2", "mlp_1": "layers.1.mlp",
    }  # fmt: skip
    assert {point.dict_size for point in recipe.hook_points.values()} == {96}
    for site, said in (("9", "layer 9"), ("layers.1.nose", "names no site")):
        with pytest.raises(ModelError, match=said):
            suggest(str(llama), sites=[site])
    with pytest.raises(RecipeError, match="too few"):
        suggest(str(llama), dict_size=2)


def test_wider_and_longer_means_slower(llama: Path) -> None:
    points = [load_recipe_text(suggest(str(llama), dict_size=size)).hook_points for size in (512, 16_384)]
    rates = [next(iter(found.values())).lr for found in points]
    assert rates == [pytest.approx(6e-3, rel=0.5), 2.5e-4]  # the line of docs/language-models.md


def test_data_bound_the_run(llama: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"row {i} " + "and more " * 20}]} for i in range(200)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CorpusError, match=r"few.jsonl holds .* tokens to train on"):
        suggest(str(llama), data=tmp_path / "few.jsonl")
    recipe = load_recipe_text(suggest(str(llama), data=tmp_path / "some.jsonl"))
    assert 2000 < recipe.training.tokens < 64 * 200


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_in_the_docs_are_recipes(path: Path) -> None:
    recipe = load_recipe(path)
    assert len(recipe.hook_points) in (3, 6)
    assert recipe.corpus.sources[0].name in ("ultrachat", "files")
