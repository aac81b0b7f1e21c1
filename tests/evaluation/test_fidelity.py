"""Fidelity equals a plain float64 numpy computation over all rows at once, however the rows are cut into batches."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwenscope.evaluation.fidelity import DENSITY_LOG10_EDGES, Fidelity, Moments, density_histogram
from qwenscope.sae.sae import Codes

ROLES = ("system", "user", "assistant")


def make_rows(rows: int, dim: int, n: int, k: int, seed: int = 0):
    """Random rows, codes (some values 0), reconstructions, roles and special flags."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=g) * torch.rand(dim, generator=g) + torch.randn(dim, generator=g)
    indices = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(rows)])
    values = torch.relu(torch.randn(rows, k, generator=g))
    x_hat = x + 0.3 * torch.randn(rows, dim, generator=g)
    roles = torch.randint(0, 2, (rows,), generator=g)  # "assistant" never occurs
    special = torch.rand(rows, generator=g) < 0.2
    return x, Codes(values, indices, n), x_hat, roles, special


def feed(fidelity: Fidelity, data, batch: int) -> Fidelity:
    x, codes, x_hat, roles, special = data
    for i in range(0, len(x), batch):
        part = slice(i, i + batch)
        piece = Codes(codes.values[part], codes.indices[part], codes.dict_size)
        fidelity.update(x[part], piece, x_hat[part], roles[part], special[part])
    return fidelity


def plain(x: torch.Tensor, x_hat: torch.Tensor, values: torch.Tensor) -> dict[str, float]:
    """The definitions, written down once more without streaming."""
    a, b = x.double().numpy(), x_hat.double().numpy()
    residual, deviation = (a - b) ** 2, (a - a.mean(0)) ** 2
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {
        "tokens": len(a),
        "mse": residual.mean(),
        "fvu": residual.sum() / deviation.sum(),
        "explained_variance": 1 - residual.sum() / deviation.sum(),
        "explained_variance_per_dim": np.mean(1 - residual.sum(0) / deviation.sum(0)),
        "cosine": cosine.mean(),
        "norm_ratio": np.mean(np.linalg.norm(b, axis=1) / np.linalg.norm(a, axis=1)),
        "l0": (values > 0).sum(1).double().mean().item(),
    }


def assert_equals(figures: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_figures_equal_a_plain_computation(batch: int) -> None:
    data = x, codes, x_hat, roles, special = make_rows(211, 12, 40, 5)
    figures = feed(Fidelity(12, 40, ROLES), data, batch).figures()
    assert_equals(figures, plain(x, x_hat, codes.values))
    assert_equals(figures["special_tokens"], plain(x[special], x_hat[special], codes.values[special]))
    assert figures["mse_special_tokens"] == figures["special_tokens"]["mse"]
    assert set(figures["roles"]) == {"system", "user"}, "roles that do not occur are absent"
    for code, name in enumerate(ROLES[:2]):
        mine = roles == code
        assert_equals(figures["roles"][name], plain(x[mine], x_hat[mine], codes.values[mine]))
    dense = codes.dense()
    assert figures["dead_latents"] == int(((dense > 0).sum(0) == 0).sum())
    assert figures["dead_fraction"] == figures["dead_latents"] / 40
    assert figures["dead_window_tokens"] == 211
    assert sum(figures["density"]["counts"]) + figures["density"]["never"] == 40
    json.dumps(figures, allow_nan=False)


def test_mean_a_thousand_standard_deviations_away() -> None:
    x, codes, x_hat, roles, special = make_rows(500, 8, 20, 3)
    x, x_hat = x.double() + 1000 * x.double().std(0), x_hat.double() + 1000 * x.double().std(0)
    figures = feed(Fidelity(8, 20, ROLES), (x, codes, x_hat, roles, special), 13).figures()
    assert_equals(figures, plain(x, x_hat, codes.values))


def test_constant_dimensions_are_left_out_of_the_per_dimension_mean_but_their_error_counts() -> None:
    x, codes, x_hat, roles, special = make_rows(300, 6, 20, 3)
    x[:, 2] = 0.1  # 0.1 is no binary fraction: a rounded mean would leave a spurious variance
    figures = feed(Fidelity(6, 20, ROLES), (x, codes, x_hat, roles, special), 7).figures()
    a, b = x.double().numpy(), x_hat.double().numpy()
    residual, deviation = (a - b) ** 2, (a - a.mean(0)) ** 2
    keep = [0, 1, 3, 4, 5]
    assert figures["constant_dimensions"] == 1
    assert figures["fvu"] == pytest.approx(residual.sum() / deviation[:, keep].sum(), rel=1e-9)
    per_dim = np.mean(1 - residual[:, keep].sum(0) / deviation[:, keep].sum(0))
    assert figures["explained_variance_per_dim"] == pytest.approx(per_dim, rel=1e-9)


def test_both_explained_variances_differ_when_dimensions_do() -> None:
    x = torch.tensor([[10.0, 0.1], [-10.0, -0.1]])
    x_hat = torch.tensor([[10.0, 0.0], [-10.0, 0.0]])
    codes = Codes(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), 2)
    fidelity = Fidelity(2, 2, ROLES)
    fidelity.update(x, codes, x_hat, torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    figures = fidelity.figures()
    assert figures["explained_variance"] == pytest.approx(1 - 0.01 / 100.01)
    assert figures["explained_variance_per_dim"] == pytest.approx(0.5)


def test_perfect_zero_mean_and_harmful_reconstructions() -> None:
    x, codes, _, roles, special = make_rows(400, 10, 30, 4)
    mean = x.double().mean(0)
    second_moment = (x.double() ** 2).sum() / ((x.double() - mean) ** 2).sum()
    for x_hat, fvu in [
        (x, 0.0),
        (torch.zeros_like(x), float(second_moment)),
        (mean.expand_as(x), 1.0),
        (2 * mean - x, 4.0),  # mirrored at the mean: twice each deviation away
    ]:
        figures = feed(Fidelity(10, 30, ROLES), (x, codes, x_hat, roles, special), 64).figures()
        assert figures["fvu"] == pytest.approx(fvu, rel=1e-9, abs=1e-15)
        assert figures["explained_variance"] == 1 - figures["fvu"]
    assert figures["explained_variance"] < 0, "nothing is clipped"


def test_one_token_has_no_variance_and_says_so() -> None:
    x, codes, x_hat, roles, special = make_rows(1, 4, 9, 2)
    figures = feed(Fidelity(4, 9, ROLES), (x, codes, x_hat, roles, special), 1).figures()
    assert figures["tokens"] == 1
    assert figures["fvu"] is None
    assert figures["explained_variance_per_dim"] is None
    assert figures["mse"] == pytest.approx(float(((x - x_hat).double() ** 2).mean()))
    json.dumps(figures, allow_nan=False)


def test_no_tokens_give_no_numbers() -> None:
    figures = Fidelity(4, 9, ROLES).figures()
    assert figures["tokens"] == 0
    assert all(figures[name] is None for name in ("mse", "fvu", "cosine", "norm_ratio", "l0", "mse_special_tokens"))
    assert figures["roles"] == {}
    json.dumps(figures, allow_nan=False)


def test_zero_rows_and_zero_reconstructions_stay_finite() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    codes = Codes(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64), 3)
    fidelity = Fidelity(2, 3, ROLES)
    fidelity.update(x, codes, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    figures = fidelity.figures()
    assert figures["cosine"] == 0
    assert figures["norm_ratio"] == 0, "only the second row has a norm to compare with"
    assert figures["l0"] == 0, "an index in the top-k with value 0 is not active"
    assert figures["dead_fraction"] == 1


def test_density_bins_are_log10_of_the_firing_share() -> None:
    fired = torch.tensor([0, 1, 10, 100, 1000])
    histogram = density_histogram(fired, 1000)
    edges = np.array(DENSITY_LOG10_EDGES)
    filled = [i for i, count in enumerate(histogram["counts"]) if count]
    assert histogram["never"] == 1
    assert [edges[i] for i in filled] == [-3, -2, -1, -0.25], "a latent that always fires falls in the last bin"


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(1e-3, 1e3),
    offset=st.floats(-1e6, 1e6),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    seed=st.integers(0, 1000),
)
@example(scale=1.0, offset=0.0, cuts=[], seed=634)  # one of its means is all but 0: rounding counts by the rows' scale
def test_moments_do_not_depend_on_how_rows_are_cut_or_merged(scale, offset, cuts, seed) -> None:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + offset
    streamed, merged = Moments(3), Moments(3)
    bounds = [0, *sorted(cuts), 60]
    for start, stop in itertools.pairwise(bounds):
        streamed.update(x[start:stop])
        part = Moments(3)
        part.update(x[start:stop])
        merged.merge(part)
    a = x.numpy()
    for moments in (streamed, merged):
        assert moments.count == 60
        np.testing.assert_allclose(moments.mean.numpy(), a.mean(0), rtol=1e-12, atol=1e-14 * scale)
        centred = ((a - a.mean(0)) ** 2).sum(0)
        np.testing.assert_allclose(moments.deviations_D.numpy(), centred, rtol=1e-9 + 1e-15 * (offset / scale) ** 2)
