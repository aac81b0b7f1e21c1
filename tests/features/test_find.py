"""Latents by example against plain counts; the planted one comes first, what fires everywhere does not come at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from planted_suite import PLANTED, PLANTED_LATENT

from qwenscope.errors import FormatError
from qwenscope.features.find import Fired, find, fired_in
from qwenscope.features.store import Index
from qwenscope.lm.forward import site_rows
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target, open_target

ON = [f"{word}{6 * PLANTED} status" for word in ("order", "title", "system release")]
"""The word is an eighth of the index's corpus, and here most of the text."""
OFF = ["order status query", "title content search", "system release error"]


@pytest.fixture(scope="module")
def target(release: Path) -> Target:
    return open_target(release)


@pytest.fixture(scope="module")
def lm(target: Target) -> LanguageModel:
    return target.language_model(truncated=True)


def test_counts_are_those_of_plain_passes(target: Target, lm: LanguageModel) -> None:
    found = fired_in(lm, target.saes, target.sites, ON)
    for sae_id, sae in target.saes.items():
        tokens, tokens_N, texts_N = 0, np.zeros(sae.dict_size), np.zeros(sae.dict_size)
        for text in ON:
            ids = torch.tensor([lm.tokenizer(text).input_ids])
            rows_TD = site_rows(lm, ids, [target.sites[sae_id]])[target.sites[sae_id]][0, 1:]
            with torch.no_grad():
                fires_TN = (sae.encode(rows_TD).dense() > 0).numpy()
            tokens += len(fires_TN)
            tokens_N += fires_TN.sum(0)
            texts_N += fires_TN.any(0)
        assert found[sae_id].tokens == tokens
        np.testing.assert_array_equal(found[sae_id].tokens_N, tokens_N)
        np.testing.assert_array_equal(found[sae_id].texts_N, texts_N)


def test_the_planted_latent_comes_first(index: Index, target: Target, lm: LanguageModel) -> None:
    hits = find(index, lm, target.saes, target.sites, ON)
    first = hits[0]
    assert (first["sae"], first["latent"], first["texts"], first["why"]) == ("sae_delta", PLANTED_LATENT, 3, "example")
    assert first["peaks"][0] == PLANTED
    counts = fired_in(lm, target.saes, target.sites, ON)
    for hit in hits:
        fired, latent = counts[hit["sae"]], hit["latent"]
        density = index.table(hit["sae"])["density"][latent]
        assert hit["share"] == fired.tokens_N[latent] / fired.tokens > density
        assert hit["rate"] == pytest.approx(density, abs=2 / index.saes[hit["sae"]]["tokens"])
        assert 1 < hit["lift"] < hit["share"] / hit["rate"]
    assert [hit["texts"] for hit in hits] == sorted((hit["texts"] for hit in hits), reverse=True)
    without = find(index, lm, target.saes, target.sites, OFF)
    assert PLANTED_LATENT not in [hit["latent"] for hit in without if hit["sae"] == "sae_delta"]


def test_what_fires_on_the_others_too_is_left_out(index: Index, target: Target, lm: LanguageModel) -> None:
    apart = find(index, lm, target.saes, target.sites, ON, but_not=OFF)
    assert (apart[0]["sae"], apart[0]["latent"]) == ("sae_delta", PLANTED_LATENT)
    assert find(index, lm, target.saes, target.sites, ON, but_not=ON) == []


def test_a_latent_at_its_base_rate_is_not_found(
    index: Index, target: Target, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws at the densities themselves: of 20 tries hardly any latent comes through."""
    random = np.random.default_rng(0)
    came = 0
    for _ in range(20):
        drawn = {
            sae_id: Fired(
                200, random.binomial(200, index.table(sae_id)["density"]).astype(float), np.full(sae.dict_size, 3.0)
            )
            for sae_id, sae in target.saes.items()
        }
        monkeypatch.setattr("qwenscope.features.find.fired_in", lambda *_, drawn=drawn: drawn)
        came += bool(find(index, lm, target.saes, target.sites, ON))
    assert came <= 2


def test_no_texts_are_refused(index: Index, target: Target, lm: LanguageModel) -> None:
    with pytest.raises(FormatError, match="at least one text"):
        find(index, lm, target.saes, target.sites, [])


@pytest.mark.parametrize("query", ["sae_delta/7", "SAE_DELTA / 7", "sae_delta 7", "sae_delta:7"])
def test_an_address_finds_its_latent(index: Index, query: str) -> None:
    hits = index.search(query)
    assert (hits[0]["sae"], hits[0]["latent"], hits[0]["why"]) == ("sae_delta", 7, "address")


def test_a_number_finds_that_latent_of_every_sae(index: Index) -> None:
    assert [(hit["sae"], hit["latent"]) for hit in index.search("9")[:2]] == [(sae_id, 9) for sae_id in index.saes]
    assert [hit["why"] for hit in index.search("9", sae_id="sae_attn")].count("address") == 1
    assert "address" not in [hit["why"] for query in ("256", "sae_nope/7", "7.5") for hit in index.search(query)]
