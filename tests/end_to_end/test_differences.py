"""An SAE on the difference of two models' rows, from the recipe to what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import make_language_model, tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from qwenscope.activations.harvest import harvest
from qwenscope.cli.main import app
from qwenscope.errors import FormatError, ModelError, QwenscopeError, RecipeError
from qwenscope.evaluation.run import evaluate
from qwenscope.features.index import build_index
from qwenscope.features.read import read
from qwenscope.features.store import Index
from qwenscope.lm.load import load_language_model
from qwenscope.lm.sites import Site, sites_of
from qwenscope.opening import open_target
from qwenscope.planning.plan import plan
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.release.package import release
from qwenscope.training.run import train

SIZES = {"dict_size": 128, "k": 4, "lr": 5e-3}
POINTS: dict[str, dict[str, Any]] = {
    "plain": {"layer": 1, "kind": "deltanet", **SIZES},
    "changed": {"site": "layers.1.diff", "kind": "deltanet", **SIZES},
    "changed_mlp": {"site": "layers.2.mlp.diff", **SIZES, "activation": "batch_topk"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and the same with other experts and an embedding a little elsewhere."""
    folder = tmp_path_factory.mktemp("two")
    first = make_language_model(folder / "first")
    weights = load_file(first / "model.safetensors")
    torch.manual_seed(1)
    for name, weight in weights.items():
        if "experts" in name or "embed" in name:
            weights[name] = weight + 0.3 * weight.std() * torch.randn_like(weight)
    second = folder / "second"
    second.mkdir()
    for path in first.iterdir():
        (second / path.name).write_bytes(path.read_bytes())
    save_file(weights, second / "model.safetensors", metadata={"format": "pt"})
    return first, second


@pytest.fixture(scope="module")
def recipe(models: tuple[Path, Path]) -> Recipe:
    return tiny_recipe(models[0], lm__model_b=str(models[1]), hook_points=POINTS, corpus__held_out_share=0.2)


def test_rows_are_those_of_the_second_model_less_the_first_s(models: tuple[Path, Path], recipe: Recipe) -> None:
    lm = load_language_model(recipe.lm, last_layer=recipe.last_layer)
    ids_CT = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    found = lm.streams(ids_CT, [9, 9], sites_of(recipe))
    plain = []
    for folder in models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        mlp = list[torch.Tensor]()
        model.model.layers[2].mlp.register_forward_hook(lambda _m, _i, output, mlp=mlp: mlp.append(output))
        with torch.no_grad():
            streams = model.model(input_ids=ids_CT, output_hidden_states=True).hidden_states
        plain.append((streams[2], mlp[0][0] if isinstance(mlp[0], tuple) else mlp[0]))
    (stream_a, mlp_a), (stream_b, mlp_b) = plain
    torch.testing.assert_close(found[Site("layers.1")], stream_a)
    torch.testing.assert_close(found[Site("layers.1.diff")], stream_b - stream_a, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[Site("layers.2.mlp.diff")], mlp_b - mlp_a, rtol=1e-4, atol=1e-6)
    alone = load_language_model(recipe.lm.model_copy(update={"model_b": None}), last_layer=recipe.last_layer)
    assert alone.digest(1) != lm.digest(1), "what was cached of one model is not taken for both"
    with pytest.raises(ModelError, match=r"layers.1.diff takes two models; name the other in lm.model_b"):
        alone.streams(ids_CT, [9, 9], [Site("layers.1.diff")])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hook_points": POINTS}, "changed reads a difference of two models; name the other: lm.model_b"),
        ({"lm__model_b": "other"}, "no hook point reads lm.model_b"),
        ({"lm__model_b": "other", "hook_points": POINTS, "lm__backend": "vllm"}, "vllm runs one model"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = tmp_path / "mine.yaml"
    tree = tiny_recipe(tmp_path).model_dump(mode="json")
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = tree
        for part in parents:
            node = node[part]
        node[last] = value
    path.write_text(json.dumps(tree))
    with pytest.raises(RecipeError, match=said):
        load_recipe(path)


def test_recipes_of_one_model_are_written_as_ever(tmp_path: Path) -> None:
    assert set(tiny_recipe(tmp_path).model_dump(mode="json")["lm"]) == {
        *("model", "revision", "dtype", "device", "backend")
    }


def test_another_tokenizer_is_refused_by_its_first_unlike_token(
    models: tuple[Path, Path], recipe: Recipe, tmp_path: Path
) -> None:
    for path in models[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = [token for token, number in vocabulary.items() if number in (20, 21)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a difference of rows takes one tokenizer"):
        load_language_model(recipe.lm.model_copy(update={"model_b": str(tmp_path)}), last_layer=1)


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("difference") / "run"
    train(recipe, folder)
    return folder


@pytest.mark.slow
def test_an_evaluation_has_its_fidelity_and_no_splice(run: Path, recipe: Recipe) -> None:
    found = evaluate(run, tokens=1500)
    target = open_target(run)
    lm = target.language_model()
    (conversations,) = target.splits(lm.tokenizer, 1500).values()
    rows = harvest(lm, conversations, sites_of(recipe), recipe.activations, recipe.corpus.batch_tokens)
    for sae_id, site in target.sites.items():
        (cell,) = found["saes"][sae_id].values()
        x_RD = rows.rows[site].double()
        with torch.no_grad():
            error = (target.saes[sae_id](rows.rows[site]).double() - x_RD).square().sum()
        assert cell["fvu"] == pytest.approx(float(error / (x_RD - x_RD.mean(0)).square().sum()), rel=1e-4)
        absent = {key for key, value in cell.items() if value is None}
        assert absent >= {"ce_spliced", "ce_recovered_zero", "kl"} if site.is_difference else "kl" not in absent
        assert cell["ce_clean"] > 0
    shown = CliRunner().invoke(app, ["evaluate", str(run), "--tokens", "1500", "--until-interval", "0.5"])
    assert shown.exit_code == 0, shown.output
    assert "–" in shown.stdout
    shown = CliRunner().invoke(app, ["compare", str(run), str(run), "--tokens", "1500"])
    assert shown.exit_code == 0, shown.output


@pytest.mark.slow
def test_an_index_and_a_reading_are_of_the_difference(run: Path, tmp_path: Path) -> None:
    evaluate(run, tokens=1500)
    build_index(run, tmp_path / "index", tokens=1500)
    summaries = Index(tmp_path / "index").saes
    assert summaries["changed"]["site"] == "layers.1.diff"
    target = open_target(run)
    lm = target.language_model()
    found = read(lm, lm.tokenizer, "search the order", target.saes)
    rows = lm.streams(torch.tensor([found.token_ids]), [len(found.token_ids)], [target.sites["changed"]])
    wanted = target.saes["changed"].encode(rows[target.sites["changed"]][0])
    assert torch.equal(found.codes["changed"].indices, wanted.indices)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "neuronpedia"])
def test_what_other_formats_cannot_say_is_refused_in_one_line(run: Path, tmp_path: Path, format: str) -> None:
    done = CliRunner().invoke(app, ["export", str(run), "--to", format, "--out", str(tmp_path / format)])
    assert isinstance(done.exception, QwenscopeError)
    assert "a difference of two models" in str(done.exception)
    assert "\n" not in str(done.exception)


@pytest.mark.slow
def test_a_release_is_of_one_model(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="changed reads a difference of two models; a release is of one"):
        release(run, tmp_path / "release")


def test_a_plan_counts_both_models(recipe: Recipe) -> None:
    points = {name: point for name, point in recipe.hook_points.items() if not point.is_difference}
    alone = recipe.model_copy(
        update={"lm": recipe.lm.model_copy(update={"model_b": None}), "hook_points": points | {"more": points["plain"]}}
    )
    both, one = plan(recipe), plan(alone)
    assert both["memory_bytes"]["language_model"] > 1.9 * one["memory_bytes"]["language_model"]
    assert both["seconds_per_step"]["language_model"][1] > 1.5 * one["seconds_per_step"]["language_model"][1]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["steer", "Hello"], ["trace"]])
def test_there_is_nothing_to_steer(run: Path, tmp_path: Path, command: list[str]) -> None:
    verb, *rest = command
    asked = [verb, str(run), *rest, "--sae", "changed", "--latent", "3"]
    if verb == "trace":
        rows = [{"text": "search the order " * 9}] * 2
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked += ["--data", str(tmp_path / "texts.jsonl")]
    done = CliRunner().invoke(app, asked)
    assert isinstance(done.exception, QwenscopeError)
    assert "difference of two models" in str(done.exception)
