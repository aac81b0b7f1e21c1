"""Pairs, bootstrap intervals and overlap against theory and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwenscope.evaluation.pairs import (
    METRICS,
    Pair,
    bootstrap,
    compare_split,
    find_pairs,
    interval,
    overlap,
    resample,
    unit_decoder,
)
from qwenscope.recipe import load_recipe
from qwenscope.sae.sae import TopKSAE


def random_sums(conversations: int, seed: int, harm: float = 0.5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    n = random.integers(5, 50, conversations).astype(float)
    clean = n * random.normal(3, 0.2, conversations)
    return {
        "residual": n * random.uniform(0.2, 0.4, conversations),
        "deviation": n,
        "predicted": n,
        "ce_clean": clean,
        "ce_spliced": clean + harm * n * random.uniform(0.5, 1.5, conversations),
        "ce_zero_ablation": clean + 5 * n,
        "ce_mean_ablation": clean + 3 * n,
        "kl_spliced": n * random.uniform(0.1, 0.3, conversations),
    }


def test_the_published_hook_points_give_four_matched_pairs_and_the_control() -> None:
    points = load_recipe("qwen3.5-35b-a3b").hook_points
    assert find_pairs(points) == [
        Pair("matched", "sae_delta_early", "sae_attn_early"),
        Pair("matched", "sae_delta_earlymid", "sae_attn_earlymid"),
        Pair("position_control", "sae_delta_mid_pos1", "sae_delta_mid"),
        Pair("matched", "sae_delta_mid", "sae_attn_mid"),
        Pair("matched", "sae_delta_late", "sae_attn_late"),
    ]


def test_models_without_kinds_have_no_pairs() -> None:
    points = load_recipe("qwen3.5-35b-a3b").hook_points
    assert find_pairs({name: point.model_copy(update={"kind": None}) for name, point in points.items()}) == []


def test_values_are_ratios_of_sums_not_means_of_ratios() -> None:
    sums = {name: np.array([1.0, 9.0]) for name in random_sums(2, 0)}
    sums |= {
        "residual": np.array([1.0, 0.0]),
        "ce_spliced": np.array([2.0, 9.0]),
        "ce_zero_ablation": np.array([3, 12]),
    }
    values = {
        name: value for name, (value, _) in bootstrap(sums | {"ce_mean_ablation": sums["predicted"] * 2}, None).items()
    }
    assert values["fvu"] == pytest.approx(0.1)
    assert values["ce_increase"] == pytest.approx(0.1)
    assert values["ce_recovered_zero"] == pytest.approx((15 - 11) / (15 - 10))


def test_bootstrap_samples_equal_a_plain_resampling_loop() -> None:
    sums = random_sums(7, 1)
    weights = resample(7, seed=3)
    assert (weights.sum(1) == 7).all()
    _, samples = bootstrap(sums, weights)["fvu"]
    for weight, sample in list(zip(weights, samples, strict=True))[:20]:
        drawn = np.repeat(np.arange(7), weight.astype(int))
        assert sample == pytest.approx(sums["residual"][drawn].sum() / sums["deviation"][drawn].sum())
    assert (resample(7, seed=3) == weights).all()
    assert (resample(7, seed=4) != weights).any()


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(100):
        sums = random_sums(80, seed)
        low, high = interval(bootstrap(sums, resample(80, seed))["kl"][1])
        covered += low < 0.2 < high
    assert 86 <= covered <= 100


def test_differences_are_paired() -> None:
    first = random_sums(40, 5)
    second = first | {"residual": first["residual"] + 0.01 * first["deviation"]}
    result = compare_split([Pair("matched", "a", "b")], {"a": first, "b": second}, seed=1)
    cell = result["differences"]["a -> b"]["fvu"]
    assert cell["difference"] == pytest.approx(0.01)
    assert cell["interval"] == pytest.approx([0.01, 0.01]), "the same draws on both sides"
    low, high = result["intervals"]["a"]["fvu"]
    assert high - low > 0.01


def test_one_conversation_has_no_interval() -> None:
    result = compare_split([], {"a": random_sums(1, 0)}, seed=1)
    assert result["intervals"]["a"] == dict.fromkeys(METRICS)


def test_overlap_equals_brute_force_and_knows_copies_from_strangers() -> None:
    sae, stranger = TopKSAE(24, 60, 4, seed=1), TopKSAE(24, 50, 4, seed=2)
    alive_sae, alive_stranger = torch.ones(60, dtype=torch.bool), torch.ones(50, dtype=torch.bool)
    alive_stranger[:10] = False
    found = overlap(sae, stranger, alive_sae, alive_stranger, seed=0)
    best = (unit_decoder(sae) @ unit_decoder(stranger)[10:].T).max(1).values
    assert found["first_in_second"]["mean_max_cosine"] == pytest.approx(float(best.mean()), abs=1e-6)
    assert found["first_in_second"]["shared"] == pytest.approx(float((best > 0.7).float().mean()))
    assert found["first_in_second"]["random_mean_max_cosine"] == pytest.approx(float(best.mean()), abs=0.03)
    assert sum(found["first_in_second"]["counts"]) == 60
    assert sum(found["second_in_first"]["counts"]) == 40
    same = overlap(sae, sae, alive_sae, alive_sae, seed=0)["first_in_second"]
    assert same["shared"] == 1
    assert same["mean_max_cosine"] == pytest.approx(1, abs=1e-6)


def test_a_dead_dictionary_has_no_overlap() -> None:
    sae = TopKSAE(8, 10, 2, seed=1)
    dead, alive = torch.zeros(10, dtype=torch.bool), torch.ones(10, dtype=torch.bool)
    assert overlap(sae, sae, dead, alive, seed=0) == {"first_in_second": None, "second_in_first": None}
