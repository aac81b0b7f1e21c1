"""Effects, permutation tests and intervals against plain computations; shuffled labels give no discovery."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from qwenscope.analysis.probes import best_feature, cross_validated, folds_of, ridge, sparse
from qwenscope.analysis.statistics import (
    Design,
    auroc,
    auroc_interval,
    cohens_d,
    effect_intervals,
    effects,
    permutation_test,
)
from qwenscope.errors import CorpusError
from qwenscope.evaluation.pairs import resample
from qwenscope.seeds import derive_seed


def features(conversations: int, count: int, seed: int = 0) -> torch.Tensor:
    """Sparse and dense ones, some alike, some without variation."""
    random = np.random.default_rng(seed)
    active = random.random((conversations, count)) < random.random(count) ** 2
    values = active * random.gamma(2.0, size=(conversations, count))
    values[:, 1] = values[:, 0] + 0.1 * values[:, 1]
    values[:, 2] = 3.0
    return torch.from_numpy(values).float()


def halves(conversations: int) -> np.ndarray:
    return np.arange(conversations) < conversations // 2


def test_effects_are_correlations() -> None:
    values, positive = features(30, 20), halves(30)
    with np.errstate(invalid="ignore"):
        expected = [np.corrcoef(values[:, f].numpy(), positive)[0, 1] for f in range(20)]
    assert np.allclose(effects(values, Design(positive, False)), np.nan_to_num(expected), atol=1e-5)
    pairs = Design(np.arange(30) % 2 == 0, True)
    difference = (values[0::2] - values[1::2]).double().numpy()
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(difference.mean(0) / np.sqrt((difference**2).mean(0)))
    assert np.allclose(effects(values, pairs), expected, atol=1e-5)


def test_cohens_d_is_the_standardised_difference() -> None:
    values, positive = features(40, 5), np.arange(40) < 15
    one, other = values[:15, 0].double().numpy(), values[15:, 0].double().numpy()
    within = np.sqrt((15 * one.var() + 25 * other.var()) / 40)
    design = Design(positive, False)
    found = cohens_d(float(effects(values[:, :1], design)[0]), design)
    assert found == pytest.approx((one.mean() - other.mean()) / within, rel=1e-3)
    assert cohens_d(1.0, design) is None


@pytest.mark.parametrize("paired", [False, True])
def test_p_values_are_those_of_all_permutations(paired: bool) -> None:
    values = features(10, 6, seed=3)
    positive = np.arange(10) % 2 == 0 if paired else halves(10)
    design = Design(positive, paired)
    observed = effects(values, design).abs().numpy() - 1e-5
    if paired:
        signs = np.array(list(product([-1, 1], repeat=5)))
        drawn = np.abs(signs @ design.units(values).numpy() / 5)
    else:
        labels = np.zeros((252, 10), dtype=bool)
        for row, chosen in enumerate(combinations(range(10), 5)):
            labels[row, list(chosen)] = True
        drawn = np.stack([effects(values, Design(row, False)).abs().numpy() for row in labels])
    exact = (drawn >= observed).mean(0)
    family = (drawn.max(1)[:, None] >= observed).mean(0)
    tested = permutation_test(values, design, seed=1)
    assert np.allclose(tested.p_F, exact, atol=0.05)
    assert np.allclose(tested.family_F, family, atol=0.06)


def test_a_planted_feature_is_found_among_thousands() -> None:
    values, positive = features(80, 3000), halves(80)
    values[:, 5] += torch.from_numpy(positive).float() * 4
    tested = permutation_test(values, Design(positive, False), seed=0)
    assert (tested.q_F <= 0.05).nonzero()[0].tolist() == [5]
    assert tested.family_F[5] <= 0.002
    assert tested.permutations > 20 * 3000


@pytest.mark.parametrize("paired", [False, True])
def test_shuffled_labels_give_no_discovery(paired: bool) -> None:
    values = features(40, 120, seed=1)
    random = np.random.default_rng(2)
    with_any = family = 0
    for run in range(100):
        order = random.permutation(20) if paired else random.permutation(40)
        if paired:
            swapped = random.random(20) < 0.5
            shuffled = values.view(20, 2, -1)[torch.from_numpy(order)].clone()
            shuffled[torch.from_numpy(swapped)] = shuffled[torch.from_numpy(swapped)].flip(1)
            tested = permutation_test(shuffled.view(40, -1), Design(np.arange(40) % 2 == 0, True), seed=run)
        else:
            tested = permutation_test(values, Design(halves(40)[order], False), seed=run)
        with_any += bool((tested.q_F <= 0.05).any())
        family += bool((tested.family_F <= 0.05).any())
    assert with_any <= 8
    assert family <= 10


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_are_those_of_effects_on_drawn_conversations(paired: bool) -> None:
    values = features(24, 4, seed=5)
    positive = np.arange(24) % 2 == 0 if paired else halves(24)
    design = Design(positive, paired)
    samples = []
    if paired:
        for weights in resample(12, 7).astype(int):
            rows = np.repeat(np.arange(12), weights)
            drawn = values.view(12, 2, -1)[torch.from_numpy(rows)].reshape(24, -1)
            samples.append(effects(drawn, design)[0])
    else:
        draws = zip(*(resample(12, derive_seed(7, side)).astype(int) for side in (0, 1)), strict=True)
        for of_positive, of_negative in draws:
            rows = np.repeat(np.arange(24), np.concatenate([of_positive, of_negative]))
            samples.append(effects(values[torch.from_numpy(rows)], design)[0])
    expected = np.quantile(samples, [0.025, 0.975])
    assert np.allclose(effect_intervals(values, design, 7)[0], expected, atol=1e-4)


def test_auroc_and_its_interval() -> None:
    random = np.random.default_rng(0)
    positive, groups = np.arange(60) % 2 == 0, np.arange(60) // 2
    scores = np.round(random.normal(size=60) + positive, 1)
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    samples = []
    for weights in resample(30, 3)[:, groups].astype(int):
        rows = np.repeat(np.arange(60), weights)
        samples.append(roc_auc_score(positive[rows], scores[rows]))
    found = auroc_interval(scores, positive, groups, 3)
    assert found is not None
    assert np.allclose(found, np.quantile(samples, [0.025, 0.975]), atol=1e-6)


def test_groups_stay_on_one_side_and_probes_see_what_is_there() -> None:
    random = np.random.default_rng(4)
    positive, groups = np.arange(120) % 2 == 0, np.arange(120) // 6
    values = random.normal(size=(120, 40)).astype(np.float32)
    noise = [cross_validated(values, positive, groups, folds_of(positive, groups, 0), fit, 0)["auroc"] for fit in
             (ridge, sparse, best_feature)]  # fmt: skip
    assert all(0.3 < value < 0.7 for value in noise)
    values[:, 3] += 3 * positive
    folds = folds_of(positive, groups, 0)
    for train, held in folds:
        assert not set(groups[train]) & set(groups[held])
    for fit in (ridge, sparse, best_feature):
        found = cross_validated(values, positive, groups, folds, fit, 0)
        assert found["auroc"] > 0.9
        assert found["interval"][0] > 0.8
    with pytest.raises(CorpusError, match="one group"):
        folds_of(positive, np.zeros(120, dtype=np.int64), 0)
