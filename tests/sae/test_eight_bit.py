"""Scores from 8-bit products: within their own error bound, outlying columns apart, and certified into exact ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwenscope.sae.eight_bit import CHUNK_ROWS, COLUMNS_APART, EightBit, columns_apart, quantise
from qwenscope.sae.ops import Panels
from qwenscope.sae.selection import Selector


def case(rows: int, hidden: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight, bias) in general position, latents of different lengths."""
    generator = torch.Generator().manual_seed(seed + rows + n)
    weight = torch.randn(n, hidden, generator=generator) * torch.rand(n, 1, generator=generator)
    return torch.randn(rows, hidden, generator=generator), weight, 0.1 * torch.randn(n, generator=generator)


def scores_of(shadow: EightBit, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([scores.clone() for scores in shadow.scores(Panels.of(x), weight, bias)])


def with_outliers(x: Tensor, columns: list[int], factor: float) -> Tensor:
    x = x.clone()
    x[:, columns] *= factor
    return x


@pytest.mark.parametrize(("rows", "hidden", "n"), [(1, 8, 5), (17, 40, 33), (CHUNK_ROWS + 44, 300, 70)])
def test_errors_stay_within_half_a_step_of_each_factor(rows: int, hidden: int, n: int) -> None:
    x, weight, bias = case(rows, hidden, n)
    x[0] = 0.0
    weight[1] = 0.0
    error = (scores_of(EightBit(weight), x, weight, bias) - torch.addmm(bias, x, weight.T)).abs()
    x_step, w_step = x.abs().amax(1, keepdim=True) / 127, weight.abs().amax(1) / 127
    bound = x.abs().sum(1, keepdim=True) * w_step / 2 + x_step * weight.abs().sum(1) / 2 + hidden * x_step * w_step / 4
    assert (error <= bound + 1e-5).all()


def test_a_row_of_zeros_is_zero() -> None:
    values, scale = quantise(torch.zeros(2, 5))
    assert not values.any()
    assert torch.equal(scale, torch.ones(2, 1))


def test_outlying_columns_are_apart_and_others_are_not() -> None:
    x, _, _ = case(200, 300, 4)
    assert len(columns_apart(Panels.of(x))) == 0
    outlying = [0, 140, 299]
    assert sorted(columns_apart(Panels.of(with_outliers(x, outlying, -30.0))).tolist()) == outlying
    many = list(range(2 * COLUMNS_APART))
    assert len(columns_apart(Panels.of(with_outliers(x, many, 30.0)))) == COLUMNS_APART


def test_outlying_columns_leave_the_others_their_bits() -> None:
    x, weight, bias = case(100, 300, 50)
    big = with_outliers(x, [3, 150], 200.0)
    error = scores_of(EightBit(weight), big, weight, bias) - torch.addmm(bias, big, weight.T)
    plain = scores_of(EightBit(weight), x, weight, bias) - torch.addmm(bias, x, weight.T)
    assert float(error.std()) < 1.5 * float(plain.std())


def test_rows_of_the_encoder_are_refreshed_by_slice_and_by_index() -> None:
    _, weight, _ = case(1, 20, 200)
    shadow, fresh = EightBit(torch.zeros_like(weight)), EightBit(weight)
    shadow[slice(0, 150)] = weight[:150]
    rest = torch.arange(150, 200).flip(0)
    shadow[rest] = weight[rest]
    assert torch.equal(shadow.values_ND, fresh.values_ND)
    assert torch.equal(shadow.scale_N, fresh.scale_N)


@pytest.mark.parametrize(("hidden", "n", "k"), [(64, 1024, 8), (300, 2048, 32), (33, 500, 5), (16, 24, 8), (8, 10, 10)])
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_exact_selects_what_float32_selects(hidden: int, n: int, k: int, factor: float) -> None:
    x, weight, bias = case(600, hidden, n)
    x = with_outliers(x, [1, 5], factor)
    x[3] = 0.0
    x[4] = 100 * x[4]
    result = Selector(k, "exact")(x, weight, EightBit(weight), bias)
    pre = torch.addmm(bias, x, weight.T)
    values, _ = pre.topk(k, dim=1)
    torch.testing.assert_close(result.values.sort(1, descending=True).values, values.relu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.values, pre.gather(1, result.indices).relu(), rtol=1e-4, atol=1e-4)


def test_rows_with_nan_are_not_certified() -> None:
    x, weight, bias = case(40, 30, 400)
    x[7, 2] = torch.nan
    result = Selector(5, "exact")(x, weight, EightBit(weight), bias)
    assert result.redone >= 1
    assert result.values[7].isnan().all()


def test_named_latents_come_along() -> None:
    x, weight, bias = case(300, 16, 64)
    names = torch.tensor([3, 17, 60])
    named = Selector(4, "exact")(x, weight, EightBit(weight), bias, names).named
    assert named is not None
    assert named.dtype == torch.bfloat16
    torch.testing.assert_close(named.float(), (x @ weight.T + bias)[:, names], rtol=0, atol=0.15)
