"""Suites of every kind that others publish: evaluated, indexed, browsed, read, steered and compared like ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from foreign_saes import DICT_SIZE, saelens
from tiny_run import make_language_model

from qwenscope import evaluate, load_suite
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
from qwenscope.recipe import LMRecipe
from qwenscope.sae.formats import import_suite

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
