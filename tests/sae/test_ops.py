"""Sparse products and sums against dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwenscope.sae.ops import PANEL_COLUMNS, Pairs, Panels, decode, weighted_rows


def case(rows: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(indices [B, K] distinct within rows, values [B, K], dense [B, N])."""
    generator = torch.Generator().manual_seed(rows * n + k)
    indices = torch.rand(rows, n, generator=generator).topk(k, dim=1).indices
    values = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    return indices, values, torch.zeros(rows, n, dtype=torch.float64).scatter(1, indices, values)


@pytest.mark.parametrize(("rows", "n", "k"), [(7, 12, 3), (1, 5, 5), (40, 700, 1), (33, 40_000, 6)])
@pytest.mark.parametrize("hidden", [9, PANEL_COLUMNS, 2 * PANEL_COLUMNS + 3])
def test_pairs(rows: int, n: int, k: int, hidden: int) -> None:
    indices, values, dense = case(rows, n, k)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    table = torch.randn(n, hidden, generator=generator, dtype=torch.float64)
    pairs = Pairs.of(indices, n)
    assert torch.equal(pairs.unsort(pairs.sort(values)), values)
    assert (pairs.latents.diff() >= 0).all()
    assert torch.equal(indices.reshape(-1)[pairs.order], pairs.latents.long())
    torch.testing.assert_close(pairs.unsort(pairs.products(table, x)), (x @ table.T).gather(1, indices))
    torch.testing.assert_close(pairs.totals(pairs.sort(values)), dense.sum(0))
    expected = dense.T @ x
    torch.testing.assert_close(pairs.latent_rows(x, pairs.sort(values), 0, n), expected)
    middle = n // 3
    torch.testing.assert_close(pairs.latent_rows(x, pairs.sort(values), middle, n), expected[middle:])
    torch.testing.assert_close(weighted_rows(table, indices, values), dense @ table)
    torch.testing.assert_close(decode(table, indices, values)[:], dense @ table)


@pytest.mark.parametrize("hidden", [1, PANEL_COLUMNS, PANEL_COLUMNS + 1, 3 * PANEL_COLUMNS - 1])
def test_panels_are_the_matrix(hidden: int) -> None:
    x = torch.randn(hidden, 11, generator=torch.Generator().manual_seed(2)).T  # not contiguous
    panels = Panels.of(x)
    assert len(panels) == 11
    assert all(part.is_contiguous() for part in panels.parts)
    assert torch.equal(panels[:], x)
    assert torch.equal(panels[3:7], x[3:7])
    some = torch.tensor([5, 5, 0])
    assert torch.equal(panels[some], x[some])
    assert torch.equal(panels.to(torch.bfloat16)[:], x.bfloat16())
    torch.testing.assert_close(panels.squares(), x.square().sum(1))


def test_sums_over_bfloat16_rows_have_the_dtype_of_their_weights() -> None:
    indices, values, dense = case(40, 700, 2)
    x = torch.randn(40, 9, generator=torch.Generator().manual_seed(1)).bfloat16()
    pairs = Pairs.of(indices, 700)
    sums = pairs.latent_rows(x, pairs.sort(values.float()), 0, 700)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, dense.T.float() @ x.float(), rtol=0.02, atol=0.02)


def test_latents_without_pairs_get_zeros() -> None:
    indices = torch.tensor([[4], [4]])
    pairs = Pairs.of(indices, 6)
    rows = pairs.latent_rows(torch.ones(2, 3), torch.tensor([1.0, 2.0]), 0, 6)
    assert torch.equal(rows, torch.tensor([0.0, 0, 0, 0, 3, 0]).unsqueeze(1).expand(6, 3))
    assert pairs.totals(torch.tensor([1.0, 2.0])).tolist() == [0, 0, 0, 0, 3, 0]


def test_pairs_of_one_latent_keep_the_order_of_rows() -> None:
    pairs = Pairs.of(torch.zeros(100, 1, dtype=torch.int64), 3)
    assert pairs.rows.tolist() == list(range(100))
