"""One pass, six dictionaries: two at one residual stream, one each at an MLP, a mixer, heads and the middle of a layer;
every command on them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_language_model, tiny_recipe
from typer.testing import CliRunner

from qwenscope import SAE
from qwenscope.cli.main import app
from qwenscope.features.store import Index
from qwenscope.opening import open_target
from qwenscope.release.card import model_card
from qwenscope.release.facts import read_facts

pytestmark = pytest.mark.slow

SIZES = {"dict_size": 128, "k": 3, "lr": 2e-3}
POINTS: dict[str, dict[str, Any]] = {
    "stream": {"layer": 1, "kind": "deltanet", **SIZES},
    "stream_batch": {"layer": 1, "kind": "deltanet", **SIZES, "activation": "batch_topk"},
    "experts": {"site": "layers.2.mlp", "kind": "deltanet", **SIZES},
    "attention": {"site": "layers.3.mixer", "kind": "attention", **SIZES},
    "heads": {"site": "layers.2.heads", **SIZES},
    "middle": {"site": "layers.2.mid", **SIZES},
}


def qwenscope(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    model = make_language_model(folder / "model")
    recipe = tiny_recipe(model, hook_points=POINTS, training__tokens=20_000, corpus__held_out_share=0.2)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    qwenscope("train", folder / "recipe.yaml", "--out", folder / "run")
    qwenscope("evaluate", folder / "run", "--tokens", 2000)
    qwenscope("index", folder / "run", "--out", folder / "index", "--tokens", 2000)
    qwenscope("release", folder / "run", "--out", folder / "release")
    return folder


def test_each_dictionary_says_where_it_reads(folder: Path) -> None:
    sites = {sae_id: point.get("site", "layers.1") for sae_id, point in POINTS.items()}
    evaluation = json.loads((folder / "run/evaluation.json").read_text())
    summaries = Index(folder / "index").saes
    for sae_id, site in sites.items():
        named = None if sae_id.startswith("stream") else site
        config = json.loads((folder / "run/saes" / sae_id / "config.json").read_text())
        for told in (config, evaluation["hook_points"][sae_id], summaries[sae_id]):
            assert told.get("site") == named
            assert told["layer"] == int(site.split(".")[1])
    for target in (folder / "run", folder / "release"):
        assert {sae_id: str(site) for sae_id, site in open_target(target).sites.items()} == sites


def test_each_dictionary_fits_the_rows_of_its_own_site_best(folder: Path) -> None:
    """Rows by plain hooks: FVU at the SAE's own site is below that at any other, and near the measured one."""
    target = open_target(folder / "run")
    lm = target.language_model()
    ids = [torch.from_numpy(c.token_ids.astype("int64")) for c in target.splits(lm.tokenizer, 1000)["tool_use"]]
    layers: Any = lm.model.get_decoder().layers
    modules = {"layers.1": layers[1], "layers.2.mlp": layers[2].mlp, "layers.3.mixer": layers[3].self_attn}
    entered = {"layers.2.heads": layers[2].linear_attn.out_proj, "layers.2.mid": layers[2].post_attention_layernorm}
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in (*modules, *entered)}
    for name, module in (modules | entered).items():

        def keep(_module: Any, inputs: Any, output: Any, name: str = name) -> None:
            output = inputs if name in entered else output
            rows[name].append((output[0] if isinstance(output, tuple) else output)[0, 1:])

        module.register_forward_hook(keep)
    with torch.no_grad():
        for row in ids:
            lm.model(row[None])
    evaluation = json.loads((folder / "run/evaluation.json").read_text())["saes"]
    for sae_id, sae in target.saes.items():
        fvu = {}
        for name, parts in rows.items():
            x = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
            if x.shape[1] != sae.hidden_dim:
                continue
            with torch.no_grad():
                fvu[name] = float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())
        own = str(target.sites[sae_id])
        assert min(fvu, key=fvu.__getitem__) == own, (sae_id, fvu)
        assert fvu[own] == pytest.approx(evaluation[sae_id]["tool_use"]["fvu"], rel=0.2)


def test_two_dictionaries_of_one_site_are_trained_apart(folder: Path) -> None:
    saes = {sae_id: SAE.from_pretrained(folder / "run", sae_id) for sae_id in ("stream", "stream_batch")}
    assert [sae.activation.name for sae in saes.values()] == ["topk", "batch_topk"]
    assert not torch.equal(*(sae.encoder.weight for sae in saes.values()))
    summaries = Index(folder / "index").saes
    assert 0 < summaries["stream"]["l0"] <= 3
    assert summaries["stream_batch"]["l0"] == pytest.approx(3, rel=0.5)


def test_latents_of_all_sites_are_steered_together(folder: Path) -> None:
    def steered(*saes: str) -> str:
        pairs = [word for sae_id in saes for word in ("--sae", sae_id, "--latent", 5)]
        options = ("--strength", 3, "--max-new-tokens", 3)
        return qwenscope("steer", folder / "run", "order status", *pairs, *options)

    texts = [*map(steered, ("experts", "attention", "heads", "middle")), steered(*POINTS)]
    assert len(set(texts)) == 5


def test_people_are_told(folder: Path) -> None:
    card = (folder / "release/README.md").read_text()
    for name in ("layers.2.mlp", "layers.3.mixer", "layers.2.heads", "layers.2.mid", "batch_topk"):
        assert f"| {name} |" in card
    report = (folder / "run/report.html").read_text()
    assert ">2.mlp</td>" in report
    assert "3.mixer attention" in report
    suite = json.loads((folder / "release/config.json").read_text())
    assert {entry["sae_id"]: entry.get("activation") for entry in suite["saes"]} == {
        **dict.fromkeys(POINTS),
        "stream_batch": "batch_topk",
    }


def test_the_published_code_encodes_as_the_library_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's example without this package, as it stands, for the dictionary whose activation is no top-k."""
    release = folder / "release"
    facts = read_facts(release)
    points = {"stream_batch": facts.recipe.hook_points["stream_batch"]}
    card = model_card(replace(facts, recipe=facts.recipe.model_copy(update={"hook_points": points})))
    usage, plain = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert "from qwenscope import SAE\n" in usage
    monkeypatch.chdir(release)
    names: dict[str, Any] = {}
    exec(plain, names)
    sae = SAE.from_pretrained(release, "stream_batch")
    assert names["latents_BN"].any()
    torch.testing.assert_close(names["latents_BN"], sae.encode(names["x_BD"]).dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(names["x_hat_BD"], sae(names["x_BD"]).detach(), rtol=1e-5, atol=1e-5)
