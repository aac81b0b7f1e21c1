"""Synthetic features fire as their law says, and recovery scores the truth 1 and strangers low."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from truth import FAMILY, GROUP, cross_seed_stability, ground_truth, match, recovery

from qwenscope.evaluation.pairs import unit_decoder
from qwenscope.sae.sae import TopKSAE


def sae_of(directions_FD: torch.Tensor, k: int) -> TopKSAE:
    """An SAE whose latents are the given unit directions, tied."""
    features, dim = directions_FD.shape
    sae = TopKSAE(dim, features, k, seed=0)
    with torch.no_grad():
        sae.encoder.weight.copy_(directions_FD)
        sae.decoder.weight.copy_(directions_FD.T)
        sae.encoder.bias.fill_(-1e-3)  # above rounding, far below any coefficient
    return sae


@pytest.mark.parametrize("kind", ["sparse", "correlated", "hierarchical"])
def test_every_feature_fires_at_its_own_frequency(kind) -> None:
    truth = ground_truth(24, 64, kind=kind, active=6, seed=1)
    _, coefficients = truth.sample(40_000, seed=2)
    measured = (coefficients > 0).double().mean(0)
    assert float(truth.frequency_F.sum()) == pytest.approx(6)
    deviation = (truth.frequency_F * (1 - truth.frequency_F) / 40_000).sqrt()
    assert ((measured - truth.frequency_F).abs() < 5 * deviation).all()


def test_rows_are_the_combination_of_their_features() -> None:
    truth = ground_truth(16, 48, active=4, seed=3)
    x, coefficients = truth.sample(100, seed=4)
    torch.testing.assert_close(x, coefficients @ truth.directions_FD)
    torch.testing.assert_close(truth.directions_FD.norm(dim=1), torch.ones(48))
    again, _ = truth.sample(100, seed=4)
    other, _ = truth.sample(100, seed=5)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)


def test_noise_has_the_stated_size() -> None:
    clean = ground_truth(16, 48, active=4, seed=3)
    noisy = ground_truth(16, 48, active=4, noise=0.1, seed=3)
    x, coefficients = noisy.sample(5000, seed=4)
    assert float((x - coefficients @ clean.directions_FD).std()) == pytest.approx(0.1, rel=0.02)


def test_groups_of_the_correlated_kind_fire_together_and_strangers_do_not() -> None:
    truth = ground_truth(16, 64, kind="correlated", active=8, seed=5)
    _, coefficients = truth.sample(20_000, seed=6)
    correlation = torch.corrcoef((coefficients > 0).double().T)
    group = torch.arange(64) // GROUP
    same = (group[:, None] == group[None, :]) & ~torch.eye(64, dtype=torch.bool)
    assert float(correlation[same].mean()) > 0.2
    assert abs(float(correlation[group[:, None] != group[None, :]].mean())) < 0.01


def test_children_fire_only_with_their_parent() -> None:
    truth = ground_truth(16, 64, kind="hierarchical", active=6, seed=7)
    _, coefficients = truth.sample(5000, seed=8)
    fires = coefficients > 0
    parent = fires[:, torch.arange(64) // FAMILY * FAMILY]
    assert not (fires & ~parent).any()
    assert (fires & parent).sum() > fires[:, ::FAMILY].sum(), "children do fire"


def test_recovery_of_the_truth_is_one_in_any_order() -> None:
    truth = ground_truth(64, 64, active=2, seed=9)
    orthogonal = torch.linalg.qr(truth.directions_FD.T)[0].T.contiguous()
    truth = dataclasses.replace(truth, directions_FD=orthogonal)
    shuffled = orthogonal[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    scores = recovery(truth, sae_of(shuffled, k=20), rows=2000, seed=10)
    assert scores["mean_max_cosine"] == pytest.approx(1, abs=1e-6)
    assert scores["recovered"] == 1
    assert scores["matched_f1"] > 0.97, "only rows with more than k features can miss one"


def test_recovery_of_a_stranger_is_low_and_missing_latents_count_zero() -> None:
    truth = ground_truth(64, 128, active=4, seed=11)
    stranger = recovery(truth, TopKSAE(64, 128, 4, seed=12), rows=500, seed=13)
    assert stranger["recovered"] == 0
    assert stranger["mean_max_cosine"] < 0.5
    half = recovery(truth, sae_of(truth.directions_FD[:64], k=4), rows=500, seed=13)
    assert half["recovered"] == pytest.approx(0.5)
    assert half["matched_cosine"] == pytest.approx(0.5, abs=1e-6)
    assert half["matched_f1"] <= 0.5


def test_matching_is_the_best_of_all_permutations() -> None:
    similarity = torch.rand(5, 5, generator=torch.Generator().manual_seed(14))
    rows, columns = match(similarity)
    best = max(sum(float(similarity[i, p[i]]) for i in range(5)) for p in itertools.permutations(range(5)))
    assert float(similarity[rows, columns].sum()) == pytest.approx(best)


def test_stability_is_one_for_a_permuted_copy_and_low_for_another_seed() -> None:
    sae, other = TopKSAE(32, 48, 4, seed=1), TopKSAE(32, 48, 4, seed=2)
    copy = sae_of(unit_decoder(sae).flip(0), k=4)
    assert cross_seed_stability(sae, copy) == {"mean_cosine": pytest.approx(1, abs=1e-6), "stable": 1.0}
    assert cross_seed_stability(sae, other)["stable"] < 0.1


def test_impossible_activity_is_refused() -> None:
    with pytest.raises(ValueError, match="active"):
        ground_truth(8, 16, active=5, seed=0)
