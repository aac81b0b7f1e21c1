"""The training step's Triton kernels, run by Triton's interpreter on CPU tensors, against plain torch."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from interpreted import in_interpreter, outside, run_interpreted

from qwenscope.sae import ops
from qwenscope.sae.ops import Pairs
from qwenscope.sae.sae import TopKSAE
from qwenscope.training.optimizer import Adam
from qwenscope.training.trainer import SAETrainer

pytest.importorskip("triton")


@outside
def test_in_interpreter() -> None:
    run_interpreted(__file__, passed=30)


def popular(rows: int, latents: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Indices [rows, k] in which latent 2 is in every row, in no order."""
    others = [n for n in range(latents) if n != 2]
    drawn = [torch.randperm(len(others), generator=generator)[: k - 1] for _ in range(rows)]
    return torch.stack([torch.cat([torch.tensor([2]), torch.tensor(others)[row]]) for row in drawn])


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_errors_and_totals(dtype: torch.dtype) -> None:
    from qwenscope.training import triton_step

    generator = torch.Generator().manual_seed(1)
    rows, d, n, k = 19, 70, 11, 4
    x, offset, rms = torch.randn(rows, d, generator=generator).to(dtype), torch.randn(d), torch.tensor(1.7)
    centred = (x.double() - offset.double()) / rms.double()
    found, squares = triton_step.centre(x, offset, rms, torch.float32)
    torch.testing.assert_close(found.double(), centred, atol=1e-5, rtol=1e-5)
    deviations = (centred - centred.mean(0)).square().sum(1)
    torch.testing.assert_close(squares.double(), torch.stack([deviations, centred.square().sum(1)]), atol=0, rtol=1e-5)

    table, indices = torch.randn(n, d, generator=generator), popular(rows, n, k, generator)
    values = torch.randn(rows, k, generator=generator).relu()
    dense = torch.zeros(rows, n).scatter_(1, indices, values)
    errors, losses = triton_step.errors(x, offset, rms, table, indices, values)
    expected = dense.double() @ table.double() - centred
    torch.testing.assert_close(errors.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.double(), expected.square().sum(1), atol=0, rtol=1e-5)

    codes = triton_step.codes(indices, values.bfloat16().float(), n)
    assert torch.equal(codes, dense.bfloat16())
    errors, losses = triton_step.errors(x, offset, rms, table, indices, values, dense @ table)
    torch.testing.assert_close(errors.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.double(), expected.square().sum(1), atol=0, rtol=1e-5)

    pairs = Pairs.of(indices, n)
    values_P, delta_P = pairs.sort(values), torch.randn(rows * k, generator=generator)
    right_P, x_squares, g_norm = delta_P * (values_P > 0), torch.rand(rows) + 1, torch.rand(rows)
    totals, fired = triton_step.pair_totals(pairs, pairs, values_P, delta_P, x_squares, g_norm)
    assert torch.equal(delta_P, right_P)
    assert torch.equal(fired, (dense > 0).any(0))
    terms = right_P, values_P * g_norm[pairs.rows], right_P.abs() * x_squares.sqrt()[pairs.rows]
    torch.testing.assert_close(totals, torch.stack([pairs.totals(term) for term in terms]), atol=1e-5, rtol=1e-5)


@in_interpreter
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("piece", [4, 128])
def test_rows_of_a_gradient_and_adam(
    moments: torch.dtype, unit: bool, cautious: bool, piece: int, monkeypatch: Any
) -> None:
    """Three steps beside torch's own Adam on the dense gradient, the second not finite; the same bits again.

    The interpreter cuts what a GPU rounds to bfloat16, whence the tolerances where moments are of that.
    """
    from qwenscope.training import triton_step

    monkeypatch.setattr(triton_step, "PIECE", piece)
    n, d, rows, k, clip, betas, eps = 9, 20, 23, 2, 2.0, (0.9, 0.999), 6.25e-10
    start = torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(5)), dim=1)
    ours, again, theirs = (
        [start.clone(), torch.zeros(n, d, dtype=moments), torch.zeros(n, d, dtype=moments)] for _ in range(3)
    )
    shadow, exact = torch.zeros(n, d, dtype=torch.bfloat16), moments == torch.float32
    generator = torch.Generator().manual_seed(4)
    for number, finite in ((1, True), (2, False), (3, True)):
        pairs = Pairs.of(popular(rows, n, k, generator), n)
        source, weights_P = torch.randn(rows, d, generator=generator), torch.randn(rows * k, generator=generator)
        slots = torch.tensor([-1, 1, -1, -1, 0, -1, -1, -1, -1], dtype=torch.int32)
        extra = torch.randn(2, d, generator=generator)
        dense = torch.zeros(n, rows).index_put_((pairs.latents.long(), pairs.rows), weights_P, accumulate=True) @ source
        dense[torch.tensor([4, 1])] += extra
        if unit:
            dense -= (dense * theirs[0]).sum(1, keepdim=True) * theirs[0]
        made = triton_step.GradientRows(source, pairs, weights_P, (extra, slots))
        squares, untouched, after = torch.zeros(3, n)
        made.squares(ours[0], squares, torch.tensor(3.0), 2.0, unit)
        made.squares(ours[0], untouched, torch.tensor(2.0), 2.0, unit)
        torch.testing.assert_close(squares, dense.square().sum(1))
        assert not untouched.any()
        divisor, lr, step = squares.sum().sqrt() / clip, torch.tensor(1e-2), torch.tensor(float(number))
        corrections = torch.tensor([1 - beta**number for beta in betas], dtype=torch.float64)
        numbers = triton_step.Numbers(lr, corrections, divisor, torch.tensor(finite), step, betas, eps, cautious)
        for state in (ours, again):
            made.step(state[0], (state[1], state[2]), shadow, after, numbers, unit)
        assert torch.equal(after, squares)
        skip = torch.tensor(float(not finite))
        Adam(lr, betas, eps, step, cautious)([theirs[0]], [dense], [theirs[1]], [theirs[2]], divisor, skip)
        if unit and finite:
            theirs[0] /= theirs[0].norm(dim=1, keepdim=True)
        for mine, same, their in zip(ours, again, theirs, strict=True):
            torch.testing.assert_close(mine, their, atol=2e-6 if exact else 2e-4, rtol=1e-5 if exact else 2e-2)
            assert torch.equal(mine, same)
        torch.testing.assert_close(shadow.float(), ours[0], atol=0, rtol=2**-7)


@in_interpreter
@pytest.mark.parametrize(
    ("precision", "eps", "apart", "pays"),
    [("fp32", 6.25e-10, 1e-5, False), ("bf16", 1.0, 1e-1, False), ("bf16", 1.0, 1e-1, True)],
)
@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.1},
        {"clip_norm": None, "normalise": True},
        {"prefixes": (5,), "clip_norm": 10.0},
        {"cautious": True},
    ],
)
def test_whole_steps(
    precision: Literal["fp32", "bf16"], eps: float, apart: float, pays: bool, options: Any, monkeypatch: Any
) -> None:
    """Three steps by the kernels beside three by plain torch, dead latents included, decoded by gathering and by a
    product; the same bits once more.

    With its usual eps the first steps of Adam are signs of gradients, and where one is about 0, bfloat16 decides (the
    interpreter cuts to it, both the errors and their gradient).
    """
    from qwenscope.training import triton_step

    weights = []
    monkeypatch.setattr(triton_step, "PIECE", 2)
    monkeypatch.setattr(ops, "product_pays", lambda *_: pays)
    for kernels in (False, True, True):
        with monkeypatch.context() as patch:
            if kernels:
                patch.setattr(ops, "fused", lambda x: x.dtype != torch.float64)
            trainer = SAETrainer(
                TopKSAE(20, 12, 2, seed=0),
                1e-2 * (1 + 99 * eps),
                precision=precision,
                eps=eps,
                dead_after_tokens=6,
                **options,
            )
            generator = torch.Generator().manual_seed(1)
            trainer.calibrate(torch.randn(12, 20, generator=generator) + 1)
            for _ in range(3):
                metrics = trainer.step(torch.randn(6, 20, generator=generator) + 1)
            assert metrics.dead > 0
            weights.append(trainer.weights.parameters | {"norm": metrics.grad_norm, "loss": metrics.loss})
    for name, plain in weights[0].items():
        difference = (weights[1][name] - plain).norm() / plain.norm()
        assert difference < apart, name
        assert torch.equal(weights[1][name], weights[2][name]), name
