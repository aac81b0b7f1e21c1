"""Whatever holds SAEs opens by one function: with its recipe, its language model, and conversations to measure on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from tiny_run import make_language_model, make_suite

from qwenscope import TopKSAE, evaluate
from qwenscope.checksums import write_checksums
from qwenscope.errors import CorpusError, FormatError, HubError, ModelError
from qwenscope.lm.sites import Site
from qwenscope.opening import open_target
from qwenscope.recipe import load_recipe
from qwenscope.sae.formats import export_suite, import_suite


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return make_suite(folder / "run", make_language_model(folder / "model"), 1)


@pytest.fixture(scope="module")
def release(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(run / "saes", tmp_path_factory.mktemp("release") / "release"))
    shutil.copy(run / "recipe.yaml", folder)
    write_checksums(folder)
    return folder


@pytest.fixture(scope="module")
def imported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's SAEs by way of SAELens: no recipe, but model and layer in each config.json."""
    folder = tmp_path_factory.mktemp("imported")
    model = load_recipe(run / "recipe.yaml").lm.model
    named = Path(shutil.copytree(run, folder / "run"))
    for config in named.glob("saes/*/config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model": model}))
    for sums in named.glob("saes/*/SHA256SUMS"):
        sums.unlink()
    export_suite(named, "saelens", folder / "saelens")
    import_suite(folder / "saelens", "saelens", folder / "ours")
    for config in folder.glob("ours/*/config.json"):
        said = json.loads(config.read_text())
        assert said["model"] == Path(model).name  # an export does not say where this machine keeps it
        config.write_text(json.dumps(said | {"model": model}))
    write_checksums(folder / "ours")
    return folder / "ours"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "what is the status of my order"}, {"role": "assistant", "content": "done"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 40)
    return path


def weights(saes: dict[str, TopKSAE]) -> dict[str, torch.Tensor]:
    return {sae_id: sae.encoder.weight for sae_id, sae in saes.items()}


def test_run_release_and_repository_are_the_same_target(run: Path, release: Path, hub: FakeHub) -> None:
    files = {path.relative_to(release).as_posix(): path.read_bytes() for path in release.rglob("*") if path.is_file()}
    hub.add("models", "org/suite", files)
    targets = [open_target(name) for name in (run, str(release), "org/suite")]
    for target in targets:
        assert target.recipe == targets[0].recipe
        assert target.sites == {"sae_delta": Site.of(1), "sae_attn": Site.of(3)}
        torch.testing.assert_close(weights(target.saes), weights(targets[0].saes), rtol=0, atol=0)
    assert [target.on_hub for target in targets] == [False, False, True]


def test_the_language_model_comes_when_asked_and_as_far_as_asked(run: Path) -> None:
    target = open_target(run)
    whole, truncated = target.language_model(), target.language_model(truncated=True)
    assert len(whole.layers) == len(truncated.layers) == 4
    first = {sae_id: point for sae_id, point in target.recipe.hook_points.items() if sae_id == "sae_delta"}
    shallow = replace(target, recipe=target.recipe.model_copy(update={"hook_points": first}))
    assert len(shallow.language_model(truncated=True).layers) == 2
    with pytest.raises(FormatError, match="sae_delta has hidden_dim 16"):
        replace(shallow, saes={"sae_delta": TopKSAE(16, 256, 2)}).language_model()


def test_an_imported_suite_is_measured_on_what_it_is_given(imported: Path, run: Path, data: Path) -> None:
    target = open_target(imported)
    assert target.sites == {"sae_delta": Site.of(1), "sae_attn": Site.of(3)}
    assert target.recipe.lm.model == load_recipe(run / "recipe.yaml").lm.model
    with pytest.raises(CorpusError, match="--data"):
        evaluate(imported, tokens=100)
    found, expected = evaluate(imported, data=data, tokens=200), evaluate(run, data=data, tokens=200)
    assert json.loads((imported / "evaluation.json").read_text()) == found
    for sae_id, splits in expected["saes"].items():
        assert found["saes"][sae_id]["chat"]["fvu"] == pytest.approx(splits["chat"]["fvu"], rel=1e-5)


def test_a_suite_without_recipe_takes_that_of_another(imported: Path, run: Path, release: Path) -> None:
    for config in (bare := shutil.copytree(imported, imported.parent / "bare")).glob("*/config.json"):
        kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "model"}
        config.write_text(json.dumps(kept))
    (bare / "SHA256SUMS").unlink()
    with pytest.raises(FormatError, match="no one language model"):
        open_target(bare)
    other = open_target(run)
    target = open_target(bare, like=other)
    assert (target.recipe.lm, target.recipe.corpus) == (other.recipe.lm, other.recipe.corpus)
    assert target.own_recipe


def test_the_published_layout_is_known_by_its_ids(hub: FakeHub, tmp_path: Path) -> None:
    sae = TopKSAE(8, 8192, 128, seed=0)
    sae.save(tmp_path / "sae_delta_early")
    files = {f"sae_delta_early/{path.name}": path.read_bytes() for path in (tmp_path / "sae_delta_early").iterdir()}
    hub.add("models", "org/published", files)
    target = open_target("org/published")
    published = load_recipe("qwen3.5-35b-a3b")
    assert target.recipe.lm == published.lm
    assert target.recipe.hook_points == {"sae_delta_early": published.hook_points["sae_delta_early"]}
    assert target.own_recipe


def test_nothing_is_written_into_the_hub_s_cache(release: Path, hub: FakeHub, data: Path, tmp_path: Path) -> None:
    files = {path.relative_to(release).as_posix(): path.read_bytes() for path in release.rglob("*") if path.is_file()}
    hub.add("models", "org/suite", files)
    with pytest.raises(FormatError, match="--out"):
        evaluate("org/suite", data=data, tokens=100)
    evaluate("org/suite", data=data, tokens=100, out=tmp_path / "measured")
    assert {path.name for path in (tmp_path / "measured").iterdir()} == {"evaluation.json", "report.html"}
    assert not list((tmp_path / "cache").rglob("evaluation.json"))


def test_what_cannot_be_opened_is_named(run: Path, release: Path, hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"no folder runs/none, and on the Hub: .*does not exist"):
        open_target("runs/none")
    with pytest.raises(FormatError, match="neither an existing folder"):
        open_target(tmp_path / "none")
    with pytest.raises(FormatError, match="local folder"):
        open_target(run, revision="v1")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/status.json").write_text('{"state": "running"}')
    with pytest.raises(FormatError, match="not complete"):
        open_target(tmp_path / "begun")
    with pytest.raises(FormatError, match="holds no SAE"):
        open_target(tmp_path)
    copy = Path(shutil.copytree(run, tmp_path / "other"))
    (copy / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("dict_size: 256", "dict_size: 255"))
    with pytest.raises(FormatError, match=r"sae_delta has dict_size 256; recipe.yaml says 255"):
        open_target(copy)
    kept = (run / "recipe.yaml").read_text().replace("activation: topk", "activation: batch_topk", 1)
    (copy / "recipe.yaml").write_text(kept)
    with pytest.raises(FormatError, match=r"sae_delta has activation topk; recipe.yaml says batch_topk"):
        open_target(copy)
    damaged = Path(shutil.copytree(release, tmp_path / "damaged"))
    (damaged / "recipe.yaml").write_text("seed: 1\n")
    with pytest.raises(FormatError, match=r"recipe.yaml is damaged"):
        open_target(damaged)
    deep = Path(shutil.copytree(run, tmp_path / "deep"))
    (deep / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("layer: 3", "layer: 9"))
    with pytest.raises(ModelError, match="sae_attn"):
        open_target(deep).language_model()
