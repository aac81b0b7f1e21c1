"""SynthSAEBench's law: trees, exclusion, correlation, sizes and frequencies are what its text says."""

from __future__ import annotations

import pytest
import torch
from synth_sae_bench import BIAS, BRANCHING, SynthSAEBench, levels, synth_sae_bench

F, D = 256, 32


@pytest.fixture(scope="module")
def truth() -> SynthSAEBench:
    return synth_sae_bench(D, F, seed=1)


@pytest.fixture(scope="module")
def coefficients(truth: SynthSAEBench) -> torch.Tensor:
    return truth.sample(20_000, seed=2)[1]


def parents_of() -> dict[int, int]:
    return {
        children.start + BRANCHING * place + number: parents.start + place
        for parents, children in levels(F)
        for place in range(parents.stop - parents.start)
        for number in range(BRANCHING)
    }


def test_trees_are_those_of_the_benchmark() -> None:
    assert [(level.stop - level.start) for _, level in levels(16_384)] == [512, 2048, 8192]
    assert list(parents_of()) == list(range(2, 2 * 85)), "two roots, 8 + 32 + 128 features below them"


def test_children_fire_with_their_parent_alone_and_one_at_a_time(coefficients: torch.Tensor) -> None:
    fires, parents = coefficients > 0, parents_of()
    for child, parent in parents.items():
        assert not (fires[:, child] & ~fires[:, parent]).any()
    for parent in set(parents.values()):
        children = [child for child, its in parents.items() if its == parent]
        assert fires[:, children].sum(1).max() <= 1
    assert fires[:, list(parents)].any(0).float().mean() > 0.9


def test_frequencies_follow_zipf_where_nothing_stands_above(truth: SynthSAEBench, coefficients: torch.Tensor) -> None:
    assert float(truth.frequency_F[0]) == pytest.approx(0.4)
    assert float(truth.frequency_F[-1]) == pytest.approx(5e-4)
    first, second = truth.frequency_F[:2] - 5e-4
    last = 256**-0.5
    assert float(second / first) == pytest.approx((2**-0.5 - last) / (1 - last))
    alone = torch.tensor([0, 1, *range(2 * 85, F)])
    measured = (coefficients > 0).double().mean(0)
    deviation = (truth.frequency_F * (1 - truth.frequency_F) / len(coefficients)).sqrt()
    assert ((measured - truth.frequency_F)[alone].abs() < 5 * deviation[alone]).all()
    assert (measured[2 : 2 * 85] <= truth.frequency_F[2 : 2 * 85] + 5 * deviation[2 : 2 * 85]).all()


def test_the_full_size_has_about_34_active_features() -> None:
    full = synth_sae_bench(2, 16_384, seed=3)
    _, coefficients = full.sample(300, seed=4)
    assert float((coefficients > 0).sum(1).double().mean()) == pytest.approx(34, abs=2)


def test_children_are_scaled_by_their_parent(truth: SynthSAEBench, coefficients: torch.Tensor) -> None:
    for child, parent in ((2, 0), (10, 2)):
        both = coefficients[coefficients[:, child] > 0]
        own = both[:, child] / (both[:, parent] / truth.mean_F[parent])
        error = float(truth.spread_F[child]) / len(both) ** 0.5
        assert float(own.mean()) == pytest.approx(float(truth.mean_F[child]), abs=5 * error)
        assert float(own.std()) == pytest.approx(float(truth.spread_F[child]), rel=0.2)


def test_features_of_no_tree_are_correlated_as_the_copula_says(truth: SynthSAEBench) -> None:
    _, coefficients = truth.sample(60_000, seed=5)
    fires = (coefficients[:, :2] > 0).double()
    joint = float((fires[:, 0] * fires[:, 1]).mean() - fires[:, 0].mean() * fires[:, 1].mean())
    want = float(truth.loading_FR[0] @ truth.loading_FR[1])
    assert joint * want > 0, "the roots fire together if their loadings agree, apart if not"


def test_rows_are_combinations_of_nearly_orthogonal_unit_directions(truth: SynthSAEBench) -> None:
    x, coefficients = truth.sample(50, seed=6)
    torch.testing.assert_close(x, coefficients @ truth.directions_FD + truth.bias_D)
    assert float(truth.bias_D.norm()) == pytest.approx(BIAS)
    torch.testing.assert_close(truth.directions_FD.norm(dim=1), torch.ones(F))

    def overlap(directions: torch.Tensor) -> float:
        return float(((directions @ directions.T).square().sum() - len(directions)) / len(directions))

    random = torch.nn.functional.normalize(torch.randn(F, D, generator=torch.Generator().manual_seed(7)), dim=1)
    assert overlap(truth.directions_FD) < 0.98 * overlap(random)
    assert torch.equal(x, truth.sample(50, seed=6)[0])


def test_too_few_features_make_no_tree() -> None:
    with pytest.raises(ValueError, match="give at least 128"):
        synth_sae_bench(8, 100, seed=0)
