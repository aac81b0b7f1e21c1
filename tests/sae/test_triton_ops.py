"""The Triton kernels, run by Triton's interpreter on CPU tensors, against plain torch.

Triton reads TRITON_INTERPRET when it is first imported, and other tests import it too: this file runs itself in a
process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Literal

import pytest
import torch

from qwenscope.sae import ops
from qwenscope.sae.ops import Pairs
from qwenscope.sae.sae import TopKSAE
from qwenscope.training.optimizer import Adam
from qwenscope.training.trainer import SAETrainer

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_interpreter starts")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "20 passed, 1 skipped" in result.stdout


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


@in_interpreter
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_projection_and_adam(moments: torch.dtype, name: str) -> None:
    """Three steps beside torch's own Adam, the second of them not finite. The interpreter cuts what a GPU rounds to
    bfloat16, whence the tolerances where moments are of that.
    """
    from qwenscope.sae import triton_ops

    generator = torch.Generator().manual_seed(4)
    n, d, unit, clip, betas, eps = 7, 300, name == "decoder", 2.0, (0.9, 0.999), 6.25e-10
    ours, theirs = (
        [torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(5)), dim=1)]
        + [torch.zeros(n, d, dtype=moments) for _ in range(2)]
        for _ in range(2)
    )
    shadow, exact = torch.zeros(n, d, dtype=torch.bfloat16), moments == torch.float32
    for number, finite in ((1, True), (2, False), (3, True)):
        gradient, step = torch.randn(n, d, generator=generator), torch.tensor(float(number))
        projected = gradient.clone()
        if unit:
            projected -= (projected * theirs[0]).sum(1, keepdim=True) * theirs[0]
        squares = triton_ops.project(gradient, ours[0] if unit else None)
        torch.testing.assert_close(gradient, projected)
        torch.testing.assert_close(squares, projected.square().sum(1))
        divisor, lr = squares.sum().sqrt() / clip, torch.tensor(1e-2)
        first, second = (1 - beta**number for beta in betas)
        numbers = torch.tensor([float(lr) / first, second**-0.5, float(divisor), float(finite), float(number)])
        triton_ops.adam(*ours[:1], gradient, *ours[1:], shadow, numbers, betas, eps, unit)
        Adam(lr, betas, eps, step)(theirs[0], projected, *theirs[1:], divisor, torch.tensor(float(not finite)))
        if unit and finite:
            theirs[0] /= theirs[0].norm(dim=1, keepdim=True)
        for mine, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, their, atol=2e-6 if exact else 2e-4, rtol=1e-5 if exact else 2e-2)
        torch.testing.assert_close(shadow.float(), ours[0], atol=0, rtol=2**-7)


@in_interpreter
@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_whole_steps(precision: Literal["fp32", "bf16"], apart: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps by the kernels beside four by plain torch, dead latents and clipping included."""
    weights = []
    for kernels in (False, True):
        with monkeypatch.context() as patch:
            if kernels:
                patch.setattr(ops, "fused", lambda x: x.dtype != torch.float64)
            trainer = SAETrainer(
                TopKSAE(24, 40, 3, seed=0), 1e-2, precision=precision, dead_after_tokens=20, clip_norm=0.1
            )
            generator = torch.Generator().manual_seed(1)
            for _ in range(4):
                metrics = trainer.step(torch.randn(12, 24, generator=generator))
            assert metrics.dead > 0
            weights.append(trainer.weights.parameters | {"norm": metrics.grad_norm, "loss": metrics.loss})
    for name, plain in weights[0].items():
        difference = (weights[1][name] - plain).norm() / plain.norm()
        assert difference < apart, name
