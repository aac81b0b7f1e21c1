"""Latents by example against plain counts; the planted one comes first, what fires everywhere does not come at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from planted_suite import PLANTED, PLANTED_LATENT

from qwenscope.errors import FormatError
from qwenscope.features.find import Fired, find, fired_in, ranked
from qwenscope.features.store import Index
from qwenscope.lm.forward import site_rows
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target, open_target

ON = [f"{word}{6 * PLANTED} status" for word in ("order", "title", "system release")]
"""The word is an eighth of the index's corpus, and here most of the text."""
PLACE = ("sae_delta", PLANTED_LATENT)
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


def test_the_planted_latent_is_found(index: Index, target: Target, lm: LanguageModel) -> None:
    hits = find(index, lm, target.saes, target.sites, ON, limit=1000)
    (planted,) = [hit for hit in hits if (hit["sae"], hit["latent"]) == PLACE]
    assert (planted["texts"], planted["why"], planted["peaks"][0]) == (3, "example", PLANTED)
    counts = fired_in(lm, target.saes, target.sites, ON)
    for hit in hits:
        fired, latent = counts[hit["sae"]], hit["latent"]
        density = index.table(hit["sae"])["density"][latent]
        assert hit["share"] == fired.tokens_N[latent] / fired.tokens > density
        assert hit["rate"] == pytest.approx(density, abs=2 / index.saes[hit["sae"]]["tokens"])
        assert 1 < hit["lift"] < hit["share"] / hit["rate"]
    assert [hit["texts"] for hit in hits] == sorted((hit["texts"] for hit in hits), reverse=True)
    assert len(find(index, lm, target.saes, target.sites, ON, limit=1)) == 1
    without = find(index, lm, target.saes, target.sites, OFF, limit=1000)
    assert PLACE not in [(hit["sae"], hit["latent"]) for hit in without]


def test_what_fires_on_the_others_too_is_left_out(index: Index, target: Target, lm: LanguageModel) -> None:
    apart = find(index, lm, target.saes, target.sites, ON, but_not=OFF, limit=1000)
    assert PLACE in [(hit["sae"], hit["latent"]) for hit in apart]
    assert find(index, lm, target.saes, target.sites, ON, but_not=ON) == []


@pytest.mark.parametrize("case", range(20))
def test_of_9_times_512_latents_the_planted_one_comes_first_and_draws_at_base_rates_do_not_come(case: int) -> None:
    """4 texts of 25 tokens; all latents fire at their own rates, from 1e-4 to 0.9; one of rate .002 twice in each."""
    random = np.random.default_rng(case)
    rates, on, off = {}, {}, {}
    for number in range(9):
        rate_N = 10 ** random.uniform(-4, np.log10(0.9), 512)
        drawn_TN = random.random((8, 25, 512)) < rate_N
        if number == case % 9:
            rate_N[case * 25] = 0.002
            drawn_TN[:, :, case * 25] = False
            drawn_TN[:4, 3:5, case * 25] = True
        rates[str(number)] = rate_N
        on[str(number)], off[str(number)] = (
            Fired(100, part.sum((0, 1)).astype(float), part.any(1).sum(0).astype(float))
            for part in (drawn_TN[:4], drawn_TN[4:])
        )
    for others in ({}, off):
        found = ranked(on, others, rates)
        assert (found[0]["sae"], found[0]["latent"], found[0]["texts"]) == (str(case % 9), case * 25, 4)
        assert len(found) == 1


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
