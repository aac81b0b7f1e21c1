"""Suites of every kind that others publish: evaluated, indexed, browsed, read, steered and compared like ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from foreign_saes import DICT_SIZE, saelens
from tiny_run import make_language_model

from qwenscope import evaluate, load_suite
from qwenscope.errors import FormatError, RecipeError
from qwenscope.evaluation.compare import compare
from qwenscope.features.browser.export import export_site
from qwenscope.features.index import build_index
from qwenscope.features.read import read
from qwenscope.features.steering import Steering, steer
from qwenscope.features.store import Index
from qwenscope.lm.forward import site_rows
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.opening import open_target
from qwenscope.recipe import LMRecipe
from qwenscope.sae.formats import import_suite
from qwenscope.training.run import train

LAYER = 2
KINDS = {
    "standard": {},
    "topk": {},
    "jumprelu": {"apply_b_dec_to_input": False},
    "gated": {},
    "matryoshka_batchtopk": {},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("lm") / "model")


@pytest.fixture(scope="module")
def lm(model: Path) -> LanguageModel:
    return load_language_model(LMRecipe(model=str(model)))


def imported(folder: Path, model: Path, kind: str, seed: int) -> Path:
    metadata = {"model_name": str(model), "hook_name": f"blocks.{LAYER + 1}.hook_resid_pre"}
    metadata["sae_lens_version"] = "6.54.12"
    saelens(folder / "there" / f"sae_{kind}", seed, kind, metadata=metadata, **KINDS[kind])
    import_suite(folder / "there", "saelens", folder / "suite")
    return folder / "suite"


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in ("topk", "jumprelu") else ()) for kind in KINDS]
)
def test_a_foreign_suite_does_what_ours_does(
    kind: str, model: Path, lm: LanguageModel, corpus: Path, tmp_path: Path
) -> None:
    suite, sae_id = imported(tmp_path / "one", model, kind, 0), f"sae_{kind}"
    sae = load_suite(suite)[sae_id]
    ids = torch.arange(5, 25).view(1, -1)
    with torch.no_grad():
        x_TD = lm.model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0]
        l0 = (sae.encode(x_TD).dense() > 0).sum(1)
    assert len(set(l0.tolist())) > 1 or kind == "topk"

    figures = evaluate(suite, data=corpus, tokens=300, out=tmp_path / "evaluated")["saes"][sae_id]["chat"]
    assert figures["fvu"] > 0
    assert 0 < figures["l0"] < DICT_SIZE

    build_index(suite, tmp_path / "index", data=corpus, tokens=1500)
    index = Index(tmp_path / "index")
    assert 0 < index.saes[sae_id]["l0"] < DICT_SIZE
    export_site(tmp_path / "index", tmp_path / "site")
    assert (tmp_path / "site/index.html").is_file()

    pieces = read(lm, lm.tokenizer, "query the order", {sae_id: sae})
    assert (pieces.codes[sae_id].values > 0).any()

    latent = int(sae.encode(x_TD).indices[-1, 0])
    with torch.no_grad(), steer(lm, Steering(LAYER, 0.0, sae=sae, latent=latent, mode="ablate")):
        ablated_TD = site_rows(lm, ids, [LAYER])[Site.of(LAYER)][0]
    codes_TN = sae.encode(x_TD).dense()
    contribution_TD = codes_TN[:, [latent]] * sae.decoder.weight[:, latent]
    torch.testing.assert_close(ablated_TD, (x_TD - contribution_TD).detach(), rtol=0, atol=1e-5)

    (pair,) = compare(suite, imported(tmp_path / "two", model, kind, 1), data=corpus, tokens=300)["pairs"]
    assert pair["splits"]["chat"]["first"]["fvu"] == pytest.approx(figures["fvu"], rel=1e-9)
    json.dumps(pair, allow_nan=False)


def test_a_transcoder_is_measured_indexed_read_steered_and_compared(
    model: Path, lm: LanguageModel, corpus: Path, tmp_path: Path
) -> None:
    metadata = {"model_name": str(model), "sae_lens_version": "6.54.12", "hook_name": f"blocks.{LAYER}.mlp.hook_in"}
    metadata["hook_name_out"] = f"blocks.{LAYER}.hook_mlp_out"
    for name, seed in (("one", 0), ("two", 1)):
        saelens(tmp_path / name / "coder", seed, "skip_transcoder", metadata=metadata)
        import_suite(tmp_path / name, "saelens", tmp_path / f"suite_{name}")
    suite, target = tmp_path / "suite_one", Site(f"layers.{LAYER}.mlp")
    opened = open_target(suite)
    assert (opened.sites, opened.targets) == ({"coder": Site(f"layers.{LAYER}.mlp_in")}, {"coder": target})
    measured = evaluate(suite, data=corpus, tokens=300, out=tmp_path / "evaluated")
    assert measured["hook_points"]["coder"]["target"] == str(target)
    assert "2.mlp_in → 2.mlp" in (tmp_path / "evaluated/report.html").read_text()

    build_index(suite, tmp_path / "index", data=corpus, tokens=1500)
    summary = Index(tmp_path / "index").saes["coder"]
    assert 0 < summary["l0"] < DICT_SIZE
    assert summary["target"] == str(target)
    export_site(tmp_path / "index", tmp_path / "site")

    sae, ids = opened.saes["coder"], torch.arange(5, 25).view(1, -1)
    rows_TD = site_rows(lm, ids, [opened.sites["coder"]])[opened.sites["coder"]][0]
    seen = read(lm, lm.tokenizer, lm.tokenizer.decode(ids[0]), {"coder": sae})
    assert seen.codes["coder"].values.shape[1] == sae.encode(rows_TD).values.shape[1]
    clean_TD = site_rows(lm, ids, [target])[target][0]
    with steer(lm, Steering(target, 2.0, sae=sae, latent=7, unit=1.0)):
        steered_TD = site_rows(lm, ids, [target])[target][0]
    direction_D = torch.nn.functional.normalize(sae.decoder.weight[:, 7].detach(), dim=0)
    torch.testing.assert_close(steered_TD, clean_TD + 2 * direction_D, rtol=0, atol=1e-5)
    with pytest.raises(FormatError, match="a transcoder's latent is only added where it predicts; ablate"):
        Steering(target, 1.0, sae=sae, latent=7, mode="ablate")

    (pair,) = compare(suite, tmp_path / "suite_two", data=corpus, tokens=300)["pairs"]
    assert pair["splits"]["chat"]["first"]["fvu"] == pytest.approx(measured["saes"]["coder"]["chat"]["fvu"], rel=1e-9)
    with pytest.raises(RecipeError, match=r"hook_points\.coder\.target: transcoders are opened, not trained"):
        train(opened.recipe, tmp_path / "run")
