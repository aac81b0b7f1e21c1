"""Firing ages and the pool of badly explained rows."""

from __future__ import annotations

import torch

from qwenscope.training.dead_latents import FiringAges, ResamplingPool, longest_dead

CPU = torch.device("cpu")


def test_ages_count_tokens_not_steps() -> None:
    ages, yes = FiringAges(3, 100, CPU), torch.tensor(True)
    ages.update(torch.tensor([True, False, False]), 60, yes)
    ages.update(torch.tensor([False, True, False]), 39, yes)
    assert ages.tokens_N.tolist() == [39, 0, 99]
    assert not ages.dead().any()
    ages.update(torch.tensor([False, True, False]), 1, yes)
    assert ages.dead().tolist() == [False, False, True]
    ages.update(torch.tensor([False, False, False]), 60, yes)
    assert longest_dead(ages.tokens_N, ages.dead_after_tokens).tolist() == [2, 0]


def test_pool_rows_age_out() -> None:
    pool = ResamplingPool(6, 2, 2, CPU)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 5):
        pool.add(torch.full((3, 2), float(step)), torch.ones(3), generator)
    assert sorted(pool.rows_PD[:, 0].tolist()) == [2, 2, 3, 3, 4, 4]


def test_pool_prefers_high_loss_and_never_draws_zero() -> None:
    pool = ResamplingPool(400, 1, 2, CPU)
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(5.0).unsqueeze(1) + 1
    loss = torch.tensor([0.0, 1.0, 1.0, 8.0, 0.0])
    for _ in range(200):
        pool.add(rows, loss, generator)
    counts = torch.bincount(pool.rows_PD[:, 0].long(), minlength=6)
    assert counts[1] == counts[5] == 0
    assert counts[4] > 150
    assert counts[2] > 50


def test_directions_are_distinct_units_even_from_copies() -> None:
    pool = ResamplingPool(12, 4, 12, CPU)
    generator = torch.Generator().manual_seed(3)
    distinct = torch.randn(3, 4, generator=generator)
    pool.add(distinct.repeat(4, 1), torch.ones(12), generator)
    directions = pool.draw(10, generator)
    assert directions.shape == (3, 4)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(3))
    assert len(torch.unique(directions, dim=0)) == 3
    assert len(pool.draw(10, generator)) == 0  # used up


def test_an_empty_pool_gives_nothing() -> None:
    pool = ResamplingPool(8, 4, 2, CPU)
    assert pool.draw(5, torch.Generator().manual_seed(0)).shape == (0, 4)


def test_non_finite_rows_never_enter() -> None:
    pool = ResamplingPool(8, 2, 4, CPU)
    rows = torch.ones(4, 2)
    rows[1] = torch.nan
    loss = torch.tensor([1.0, torch.nan, torch.inf, 2.0])
    pool.add(rows, loss, torch.Generator().manual_seed(0))
    assert torch.isfinite(pool.rows_PD).all()
    assert len(pool.draw(8, torch.Generator().manual_seed(0))) == 1  # two equal directions, one kept
