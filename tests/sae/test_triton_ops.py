"""The Triton kernels, run by Triton's interpreter on CPU tensors, against plain torch."""

from __future__ import annotations

import pytest
import torch
from interpreted import in_interpreter, outside, run_interpreted

from qwenscope.sae.ops import Pairs

pytest.importorskip("triton")


@outside
def test_in_interpreter() -> None:
    run_interpreted(__file__, passed=14)


@in_interpreter
@pytest.mark.parametrize(
    ("n", "k"), [(64, 5), (100, 1), (37, 37), (300, 40), (1000, 96), (2048, 64), (4096, 384), (16384, 64)]
)
def test_top_k(n: int, k: int) -> None:
    from qwenscope.sae import triton_ops

    scores = torch.randn(6, n, generator=torch.Generator().manual_seed(n)).bfloat16()
    scores[1] = scores[1].round()  # ties across the threshold
    scores[2] = -scores[2].abs() - 1
    scores[3] = 0.0
    scores[4] = -torch.inf
    scores[4, :3] = torch.tensor([1.0, -0.0, 2.0])
    values, indices = triton_ops.top_k(scores, k)
    expected = scores.float().sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(values.float().sort(dim=1, descending=True).values, expected)
    assert torch.equal(scores.gather(1, indices), values)
    assert all(len(set(row)) == k and row == sorted(row) for row in indices.tolist())


@in_interpreter
@pytest.mark.parametrize(("rows", "hidden", "latents", "k"), [(9, 20, 30, 4), (6, 1100, 8, 3), (5, 8, 6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_rows(rows: int, hidden: int, latents: int, k: int, dtype: torch.dtype) -> None:
    from qwenscope.sae import triton_ops

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, hidden, generator=generator).to(dtype)
    table = torch.randn(latents, hidden, generator=generator).to(dtype)
    indices = torch.stack([torch.randperm(latents, generator=generator)[:k] for _ in range(rows)])
    indices[:, 0] = torch.where((indices == 0).any(1), indices[:, 0], 0)  # one latent in every row
    pairs = Pairs.of(indices, latents)
    weights = torch.randn(rows * k, generator=generator)
    dense = table.double() @ x.double().T
    expected = dense[pairs.latents.long(), pairs.rows.long()]
    torch.testing.assert_close(
        triton_ops.products(table, x, pairs.latents, pairs.rows).double(), expected, atol=1e-4, rtol=1e-5
    )
    mixed = torch.zeros(latents, rows, dtype=torch.float64)
    mixed[pairs.latents.long(), pairs.rows.long()] = weights.double()
    found = triton_ops.weighted_sums(x, pairs.rows, weights, pairs.offsets)
    torch.testing.assert_close(found.double(), mixed @ x.double(), atol=1e-4, rtol=1e-5)
