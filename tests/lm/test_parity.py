"""The gate: rows as rounding leaves them come in, rows that are wrong in any of the ways an engine can be do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import ModelError
from qwenscope.lm.forward import final_norm, site_rows
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.lm.vllm.parity import FLOAT32, HALF, check_parity, distance, sample_rows
from qwenscope.recipe import LMRecipe, load_recipe

LAYERS = tuple(map(Site.of, (6, 7, 15, 35)))
NAMES = {site: f"sae_{site.layer}" for site in LAYERS}
Rows = dict[Site, Tensor]


def _above(site: Site) -> Site:
    return Site.of(site.layer + 1)


@pytest.fixture(scope="module")
def conversations() -> list[NDArray[np.int32]]:
    recipe = load_recipe("standin", ["corpus.sources=[{name: tool_use, weight: 1}]"])  # long conversations
    stream = CorpusStream(recipe.corpus, load_language_model(recipe.lm, last_layer=0).tokenizer, seed=4)
    lengths = (300, 17, 1, 120, 64)
    return [next(stream).token_ids[:length] for length in lengths]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_language_model(LMRecipe(model="standin", dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def reference(lm: LanguageModel, conversations: list[NDArray[np.int32]]) -> Rows:
    """At the hook points and at the layers behind them."""
    return sample_rows(lm, conversations, sorted({*LAYERS, *map(_above, LAYERS)}), 700)


def verdict(reference: Rows, rows: Rows, dtype: torch.dtype) -> object:
    return check_parity({layer: reference[layer] for layer in LAYERS}, rows, dtype, NAMES, "engine 1.0")


def test_sampled_rows_are_each_conversations_own(
    lm: LanguageModel, conversations: list[NDArray[np.int32]], reference: Rows
) -> None:
    alone = [site_rows(lm, torch.from_numpy(ids).long()[None], LAYERS) for ids in conversations]
    for layer in LAYERS:
        want_RD = torch.cat([streams[layer][0] for streams in alone])
        torch.testing.assert_close(reference[layer], want_RD, rtol=1e-4, atol=1e-4)


def test_distance_is_what_its_fields_say() -> None:
    a_RD, b_RD = torch.randn(2, 501, 8, generator=torch.Generator().manual_seed(0)).numpy().astype("float64")
    errors = np.linalg.norm(a_RD - b_RD, axis=1)
    relative = errors / np.linalg.norm(a_RD, axis=1)
    off = distance(torch.from_numpy(a_RD), torch.from_numpy(b_RD))
    assert off.median == pytest.approx(np.median(relative))
    assert off.p99 == pytest.approx(np.quantile(relative, 0.99))
    assert off.fvu == pytest.approx((errors**2).sum() / ((a_RD - a_RD.mean(axis=0)) ** 2).sum())


def test_rounding_is_admitted(conversations: list[NDArray[np.int32]], reference: Rows) -> None:
    """The same model in bfloat16 is no nearer than any engine in bfloat16; nor are float32 rows of other batches."""
    half = load_language_model(LMRecipe(model="standin", dtype="bfloat16", device="cpu"), last_layer=35)
    rows = sample_rows(half, conversations, LAYERS, 700)
    found = check_parity({layer: reference[layer] for layer in LAYERS}, rows, torch.bfloat16, NAMES, "engine 1.0")
    assert found["engine"] == "engine 1.0"
    assert found["tokens"] == 502
    assert set(found["hook_points"]) == set(NAMES.values())
    assert all(1e-3 < off["median"] < 0.03 for off in found["hook_points"].values())  # room below the tolerance
    with pytest.raises(ModelError, match="sae_6"):
        verdict(reference, rows, torch.float32)  # but it is not float32's rounding


def test_other_batches_are_admitted_in_float32(
    lm: LanguageModel, conversations: list[NDArray[np.int32]], reference: Rows
) -> None:
    verdict(reference, sample_rows(lm, conversations, LAYERS, 300), torch.float32)


def _zeros(rows: Rows, lm: LanguageModel) -> Rows:
    return {layer: torch.zeros_like(rows[layer]) for layer in LAYERS}


def _next_layer(rows: Rows, lm: LanguageModel) -> Rows:
    return {layer: rows[_above(layer)] for layer in LAYERS}


def _next_position(rows: Rows, lm: LanguageModel) -> Rows:
    return {layer: rows[layer].roll(1, dims=0) for layer in LAYERS}


def _normed(rows: Rows, lm: LanguageModel) -> Rows:
    return {layer: final_norm(lm)(rows[layer]) for layer in LAYERS}


def _noise(rows: Rows, lm: LanguageModel) -> Rows:
    random = torch.Generator().manual_seed(1)
    scales = {layer: rows[layer].norm(dim=-1, keepdim=True) / rows[layer].shape[1] ** 0.5 for layer in LAYERS}
    return {
        layer: rows[layer] + 0.1 * scales[layer] * torch.randn(rows[layer].shape, generator=random) for layer in LAYERS
    }


def _not_finite(rows: Rows, lm: LanguageModel) -> Rows:
    return {layer: rows[layer].index_fill(0, torch.tensor(5), torch.nan) for layer in LAYERS}


def _one_conversation(rows: Rows, lm: LanguageModel) -> Rows:
    """Right but for the conversation of 17 tokens."""
    return {layer: rows[layer].index_fill(0, torch.arange(300, 317), 0.0) for layer in LAYERS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "wrong", [_zeros, _next_layer, _next_position, _normed, _noise, _not_finite, _one_conversation]
)
def test_wrong_rows_are_refused(
    wrong: Callable[[Rows, LanguageModel], Rows], dtype: torch.dtype, lm: LanguageModel, reference: Rows
) -> None:
    with pytest.raises(ModelError) as refused:
        verdict(reference, wrong(reference, lm), dtype)
    message = str(refused.value)
    assert "engine 1.0" in message
    assert "hook point sae_6 (layers.6)" in message
    assert "set lm.backend to transformers" in message


@pytest.mark.parametrize("layer", LAYERS)
def test_one_wrong_hook_point_suffices_and_is_named(layer: Site, reference: Rows) -> None:
    rows = {at: reference[at] for at in LAYERS} | {layer: reference[_above(layer)]}
    with pytest.raises(ModelError, match=rf"hook point sae_{layer.layer} \({layer}\)"):
        verdict(reference, rows, torch.bfloat16)


def test_missing_rows_are_refused(reference: Rows) -> None:
    rows = {layer: reference[layer][:-1] for layer in LAYERS}
    with pytest.raises(ModelError, match=r"\(501, 64\) rows at hook point sae_6, transformers \(502, 64\)"):
        verdict(reference, rows, torch.bfloat16)


@pytest.mark.parametrize("field", ["median", "p99", "fvu"])
def test_each_number_alone_refuses(field: str) -> None:
    for limit in (FLOAT32, HALF):
        assert limit.within(limit)
        assert not replace(limit, **{field: getattr(limit, field) * 1.01}).within(limit)
        assert not replace(limit, **{field: float("nan")}).within(limit)
