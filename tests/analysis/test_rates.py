"""Stated false-positive rates: thresholds, how often they are exceeded, intervals, and when a rate is refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from qwenscope.analysis.rates import chance_interval, needed, recall_at, share, threshold_at
from qwenscope.errors import CorpusError


def test_fresh_scores_exceed_the_threshold_at_the_stated_rate() -> None:
    random = np.random.default_rng(0)
    realised = []
    for _ in range(20):
        threshold = threshold_at(random.gamma(2.0, size=20_000), 0.05, "pile")
        realised.append(float((random.gamma(2.0, size=20_000) > threshold).mean()))
    assert all(0.05 / 1.2 <= rate <= 0.05 * 1.2 for rate in realised)


def test_the_chance_of_exceeding_lies_in_its_interval() -> None:
    random = np.random.default_rng(1)
    chances = [1 - threshold_at(random.random(600), 0.02, "pile") for _ in range(2000)]
    low, high = chance_interval(600, 0.02)
    assert np.allclose(np.quantile(chances, [0.025, 0.975]), [low, high], atol=0.002)
    assert np.mean(chances) == pytest.approx(12 / 601, abs=0.0005)


def test_scores_that_are_alike_do_not_raise_the_rate() -> None:
    scores = np.zeros(1000)
    scores[:3] = 1.0
    threshold = threshold_at(scores, 0.01, "pile")
    assert threshold == 0.0
    assert (scores > threshold).mean() == 0.003


def test_a_rate_is_refused_where_the_pile_is_too_small() -> None:
    assert (needed(0.01), needed(0.001), needed(0.05)) == (500, 5000, 100)
    with pytest.raises(CorpusError, match=r"the pile has 499 conversations.*fewer than 500"):
        threshold_at(np.zeros(499), 0.01, "the pile")
    refused = recall_at(np.ones(5), np.zeros(100), 0.001, 0)
    assert "fewer than 5,000" in refused["refused"]


def test_shares_have_the_exact_binomial_interval() -> None:
    for hits, count in ((0, 20), (7, 20), (20, 20)):
        found = share(np.arange(count) < hits)
        expected = binomtest(hits, count).proportion_ci(0.95, method="exact")
        assert found["rate"] == hits / count
        assert np.allclose(found["interval"], [expected.low, expected.high])


def test_recall_at_a_rate_and_its_interval() -> None:
    random = np.random.default_rng(2)
    positive, negative = random.normal(2.0, size=300), random.normal(size=800)
    found = recall_at(positive, negative, 0.05, seed=3)
    allowed = int(0.05 * 801) - 1
    threshold = np.sort(negative)[::-1][allowed]
    assert found["recall"] == (positive > threshold).mean()
    again = []
    for _ in range(1000):
        drawn = np.sort(random.choice(negative, 800))[::-1][allowed]
        again.append((random.choice(positive, 300) > drawn).mean())
    assert np.allclose(np.quantile(again, [0.025, 0.975]), found["interval"], atol=0.03)
