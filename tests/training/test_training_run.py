"""A whole run in small: what stands in its folder, what it reports, and that a seed decides every bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import BATCH, STEPS, final_hashes, metrics, status, tiny_recipe

from qwenscope.errors import ModelError, RecipeError
from qwenscope.recipe import load_recipe
from qwenscope.training import checkpoint
from qwenscope.training.folder import check_same_recipe
from qwenscope.training.run import train
from qwenscope.training.telemetry import Progress

TOKENS = STEPS * BATCH - 10


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Progress]]:
    folder, seen = tmp_path_factory.mktemp("out") / "run", []
    train(tiny_recipe(model, checkpoint__snapshot_every_tokens=900), folder, on_progress=seen.append)
    return folder, seen


def test_the_folder_is_what_the_contract_says(run: tuple[Path, list[Progress]], model: Path) -> None:
    folder, _ = run
    visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert visible == {
        "recipe.yaml", "run.json", "status.json", "metrics.jsonl", "privacy_report.json", "checkpoints", "saes"
    }  # fmt: skip
    assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")] == []
    assert load_recipe(folder / "recipe.yaml") == tiny_recipe(model, checkpoint__snapshot_every_tokens=900)
    ended = status(folder)
    assert (ended["state"], ended["tokens_trained"], ended["tokens_target"]) == ("complete", TOKENS, TOKENS)
    assert ended["error"] is None
    facts = json.loads((folder / "run.json").read_text())
    assert facts["seed"] == 5
    assert torch.__version__.startswith(facts["machine"]["versions"]["torch"])  # without +cu130
    assert facts["sessions"][0]["threads"] == torch.get_num_threads()
    assert set(facts["revisions"]) == {"model", "corpus"}
    assert set(facts["precision"]) == {"sae_delta", "sae_attn"}


def test_final_saes_are_in_the_published_format(run: tuple[Path, list[Progress]]) -> None:
    for sae_id, layer, kind, n, k in (("sae_delta", 1, "deltanet", 256, 2), ("sae_attn", 3, "attention", 192, 3)):
        config = json.loads((run[0] / "saes" / sae_id / "config.json").read_text())
        assert (config["hidden_dim"], config["dict_size"], config["k"]) == (32, n, k)
        assert (config["layer"], config["kind"], config["sae_id"]) == (layer, kind, sae_id)
        weights = load_file(run[0] / "saes" / sae_id / "weights.safetensors")
        assert {name: list(value.shape) for name, value in weights.items()} == {
            "encoder.weight": [n, 32], "encoder.bias": [n], "decoder.weight": [32, n], "pre_bias": [32]
        }  # fmt: skip
        assert torch.allclose(weights["decoder.weight"].norm(dim=0), torch.ones(n), atol=1e-5)


def test_rotation_keeps_the_last_two_and_every_snapshot(run: tuple[Path, list[Progress]]) -> None:
    kept = [checkpoint.load(path) for path in checkpoint.list_checkpoints(run[0] / "checkpoints")]
    tokens = [found.state["tokens"] for found in kept]
    assert tokens == [15 * BATCH, 29 * BATCH, 43 * BATCH, 45 * BATCH, TOKENS]


def test_metrics_have_a_line_every_other_step_and_one_at_the_end(run: tuple[Path, list[Progress]]) -> None:
    records = metrics(run[0])
    assert [record["step"] for record in records] == list(range(2, STEPS + 1, 2))
    assert records[-1]["tokens"] == TOKENS
    for record in records:
        for sae in record["saes"].values():
            assert 0 < sae["fvu"] < 3
            assert 0 <= sae["dead"] < 1
    assert records[0]["saes"]["sae_attn"]["lr"] < records[4]["saes"]["sae_attn"]["lr"]  # warmup
    assert records[-1]["saes"]["sae_attn"]["lr"] < 0.2 * records[4]["saes"]["sae_attn"]["lr"]  # decay


def test_progress_tells_phases_and_numbers(run: tuple[Path, list[Progress]]) -> None:
    phases = list(dict.fromkeys(progress.phase for progress in run[1]))
    assert phases == ["loading model", "calibrating", "training", "saving", "complete"]
    training = [progress for progress in run[1] if progress.phase == "training"]
    assert [progress.tokens for progress in training] == [record["tokens"] for record in metrics(run[0])]
    last = training[-1]
    assert last.saes is not None
    assert last.saes["sae_attn"].fvu == metrics(run[0])[-1]["saes"]["sae_attn"]["fvu"]
    assert last.tokens_per_second > 0
    assert last.eta_seconds == 0


def test_a_seed_decides_every_bit_and_another_seed_others(
    run: tuple[Path, list[Progress]], model: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1234)  # what the caller did with the global generator does not matter
    train(tiny_recipe(model, telemetry__log_every_steps=7), tmp_path / "again")
    assert final_hashes(tmp_path / "again") == final_hashes(run[0])
    train(tiny_recipe(model, seed=6), tmp_path / "other")
    assert not set(final_hashes(tmp_path / "other").values()) & {
        value for name, value in final_hashes(run[0]).items() if name.endswith(".safetensors")
    }


def test_a_hook_point_of_another_kind_leaves_a_failed_run_that_says_so(model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model, hook_points__sae_attn__kind="deltanet")
    with pytest.raises(ModelError, match=r"hook_points\.sae_attn\.kind"):
        train(recipe, tmp_path / "run")
    assert status(tmp_path / "run")["state"] == "failed"
    assert "hook_points.sae_attn.kind" in status(tmp_path / "run")["error"]


def test_a_run_saved_before_a_key_was_there_goes_on(model: Path) -> None:
    recipe = tiny_recipe(model)
    saved = recipe.model_dump(mode="json")
    del saved["activations"]["overlap"], saved["training"]["latents_per_rank"], saved["lm"]["backend"]
    check_same_recipe(saved, recipe, Path("state.json"))
    with pytest.raises(RecipeError, match=r"lm\.backend: 'transformers' there, 'vllm' now"):
        check_same_recipe(saved, tiny_recipe(model, lm__backend="vllm"), Path("state.json"))
    saved["training"]["of_a_later_version"] = 1
    with pytest.raises(RecipeError, match=r"state\.json holds a recipe that this version does not read.*of_a_later"):
        check_same_recipe(saved, recipe, Path("state.json"))
