"""What a newcomer adds: an activation is one class in its registry, a kind of site one entry; every command has them.

Both are added for one run by a recipe, which is trained, loaded, measured, indexed and steered without another edit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import make_language_model, tiny_recipe
from torch import Tensor, nn

from qwenscope import SAE, evaluate
from qwenscope.errors import RecipeError
from qwenscope.features.index import build_index
from qwenscope.features.steering import Steering, steer
from qwenscope.features.store import Index
from qwenscope.lm.sites import KINDS, Site, SiteKind
from qwenscope.opening import open_target
from qwenscope.planning.plan import plan
from qwenscope.sae.activation import ACTIVATIONS, Activation, Largest, positive
from qwenscope.training.run import train

SITE = "layers.2.norm"


class Sharp(Activation):
    """Toy: what is above each latent's threshold, less the threshold; in training at most k of a row."""

    name = "sharp"
    has_threshold = True
    trainable = True

    def select(self, pre_BN: Tensor, threshold_N: Tensor | None) -> tuple[Tensor, Tensor]:
        assert threshold_N is not None
        return positive(pre_BN - threshold_N)

    def keep(self, values_BC: Tensor, largest: Largest) -> Tensor:
        return values_BC * largest(values_BC, self.k)


def norm(layer: nn.Module) -> nn.Module:
    return layer.get_submodule("post_attention_layernorm")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("additions")
    points: dict[str, dict[str, Any]] = {
        "sharp": {"layer": 1, "dict_size": 128, "k": 3, "lr": 2e-3, "activation": Sharp.name},
        "normed": {"site": SITE, "dict_size": 128, "k": 3, "lr": 2e-3},
    }
    recipe = tiny_recipe(make_language_model(folder / "model"), hook_points=points, corpus__held_out_share=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ACTIVATIONS, Sharp.name, Sharp)
        patch.setitem(KINDS, "norm", SiteKind(1.5, norm))
        train(recipe, folder / "run")
        yield folder / "run"


def rows_by_hook(module: nn.Module, lm: Any, ids: Tensor) -> Tensor:
    """[T, D], what a module returns in a plain pass."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        lm.model(ids[None])
    hook.remove()
    return seen[0][0]


def test_a_toy_activation_is_trained_and_loaded_as_it_says(run: Path) -> None:
    sae = SAE.from_pretrained(run, sae_id="sharp")
    assert type(sae.activation) is Sharp
    assert sae.threshold is not None
    assert float(sae.threshold.min()) > 0
    rows = torch.randn(64, sae.hidden_dim, generator=torch.Generator().manual_seed(2))
    pre_BN = (rows - sae.pre_bias) @ sae.encoder.weight.T + sae.encoder.bias
    torch.testing.assert_close(sae.encode(rows).dense(), (pre_BN - sae.threshold).relu(), rtol=0, atol=1e-5)


def test_both_are_measured_on_their_own_rows(run: Path) -> None:
    measured = evaluate(run, tokens=600)
    assert measured["hook_points"]["sharp"]["activation"] == Sharp.name
    assert "activation" not in measured["hook_points"]["normed"]
    assert measured["hook_points"]["normed"]["site"] == SITE
    target = open_target(run)
    lm = target.language_model()
    texts = [torch.from_numpy(each.token_ids.astype("int64")) for each in target.splits(lm.tokenizer, 600)["tool_use"]]
    x_RD = torch.cat([rows_by_hook(norm(lm.layers[2]), lm, ids) for ids in texts])
    with torch.no_grad():
        mse = (x_RD - target.saes["normed"](x_RD)).square().mean()
    found = measured["saes"]["normed"]["tool_use"]
    assert np.isfinite(measured["saes"]["sharp"]["tool_use"]["fvu"])
    assert found["mse"] == pytest.approx(float(mse), rel=1e-4)


def test_both_are_indexed(run: Path, tmp_path: Path) -> None:
    build_index(run, tmp_path / "index", tokens=1500)
    summaries = Index(tmp_path / "index").saes
    assert summaries["sharp"]["activation"] == Sharp.name
    assert summaries["normed"]["site"] == SITE
    assert all(summary["l0"] > 0 for summary in summaries.values())


def test_a_toy_site_is_steered_as_by_a_hook(run: Path) -> None:
    target = open_target(run)
    lm, sae = target.language_model(), target.saes["normed"]
    ids = torch.arange(3, 12)[None]
    push = 2.5 * sae.decoder.weight.detach()[:, 7]
    hook = norm(lm.layers[2]).register_forward_hook(lambda _module, _inputs, output: output + push)
    with torch.no_grad():
        expected = lm.model(ids).logits
        hook.remove()
        with steer(lm, Steering(Site(SITE), sae=sae, latent=7, strength=2.5, unit=1.0)):
            torch.testing.assert_close(lm.model(ids).logits, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(lm.model(ids).logits, expected)


@pytest.mark.parametrize("activation", ["jumprelu", "relu", "tokp"])
def test_what_is_not_trained_is_named_before_any_work(activation: str, tmp_path: Path) -> None:
    point = {"layer": 1, "dict_size": 128, "k": 3, "lr": 2e-3, "activation": activation}
    recipe = tiny_recipe(tmp_path / "no model", hook_points={"stream": point})
    match = rf"hook_points.stream.activation: '{activation}' is not trained; choose one of topk, batch_topk"
    for work in (lambda: train(recipe, tmp_path / "run"), lambda: plan(recipe)):
        with pytest.raises(RecipeError, match=match):
            work()
    assert not (tmp_path / "run").exists()
