"""The sparse step against dense autograd: gradients, norms, clipping, whole training curves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_autograd import DenseTrainer, support_of
from torch import Tensor

from qwenscope.errors import TrainingError
from qwenscope.sae.sae import TopKSAE
from qwenscope.training.optimizer import stochastic_bfloat16
from qwenscope.training.trainer import SAETrainer

# rows, hidden, latents, k: nothing divides anything; k = 1; k = n; groups of the two-stage top-k in use; one row fewer
# than a chunk, one more; more latents than fit 16 bits; several panels of columns and blocks of latents.
SHAPES = [
    (37, 19, 53, 5),
    (8, 16, 40, 1),
    (9, 8, 12, 12),
    (300, 24, 512, 7),
    (257, 10, 1024, 3),
    (5, 4, 40_000, 6),
    (60, 300, 2500, 4),
]


def make_sae(hidden: int, latents: int, k: int, dtype: torch.dtype) -> TopKSAE:
    """An SAE with nothing at its initial value, in general position."""
    generator = torch.Generator().manual_seed(11)
    sae = TopKSAE(hidden, latents, k, seed=3).to(dtype)
    with torch.no_grad():
        sae.encoder.weight += 0.2 * torch.randn(latents, hidden, generator=generator).to(dtype)
        sae.encoder.bias += 0.1 * torch.randn(latents, generator=generator).to(dtype)
        sae.pre_bias += 0.3 * torch.randn(hidden, generator=generator).to(dtype)
    return sae


def make_rows(rows: int, hidden: int, dtype: torch.dtype, seed: int = 5) -> Tensor:
    """Random rows, among them two equal ones, a row of zeros, and one that makes most pre-activations negative."""
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[1] = x[0]
    x[2] = 0.0
    return x


def first_gradient(trainer: SAETrainer) -> dict[str, Tensor]:
    """What Adam saw in the first step: its first moments are (1 - beta1) times that."""
    return {name: mean / 0.1 for name, mean in trainer.weights.means.items()}


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, or |a| where b is 0."""
    return float((a - b).norm() / b.norm()) if b.norm() > 0 else float(a.norm())


def check_step(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    precision: Any,
    tolerance: float,
    *,
    dead: int = 0,
    aux_k: int = 3,
    clip: float | None = None,
    change: Any = None,
    eight_bits: bool = False,
) -> SAETrainer:
    """One step of ours and of the reference from the same weights; compares every parameter's gradient and the norm."""
    rows, hidden, latents, k = shape
    sae, x = make_sae(hidden, latents, k, dtype), make_rows(rows, hidden, dtype)
    if change is not None:
        with torch.no_grad():
            change(sae, x)
    trainer = SAETrainer(
        sae, 1e-3, precision=precision, aux_k=aux_k, dead_after_tokens=100, clip_norm=clip, moments=dtype
    )
    trainer.weights.shadow(precision, eight_bits)
    dead_N = torch.arange(latents) % 4 == 1 if dead else torch.zeros(latents, dtype=torch.bool)
    dead_N &= dead_N.cumsum(0) <= dead
    trainer.ages.tokens_N[dead_N] = 100
    reference = DenseTrainer(sae, aux_k=aux_k, clip=clip)
    expected = reference.loss(x, dead_N, support_of(sae, x, trainer))
    metrics = trainer.step(x)
    wanted = reference.gradients(expected.loss)
    for name, gradient in first_gradient(trainer).items():
        assert relative(gradient, wanted[name]) < tolerance, name
    torch.testing.assert_close(metrics.loss, expected.loss.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(metrics.fvu, expected.fvu.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(metrics.aux_loss, expected.aux.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(metrics.grad_norm, reference.norm, rtol=tolerance, atol=1e-12)
    assert float(metrics.l0) == pytest.approx(float((expected.codes > 0).sum(1).double().mean()))
    assert int(metrics.dead) == int(dead_N.sum())
    assert bool(metrics.finite)
    fired = (expected.codes > 0).any(0)
    assert torch.equal(trainer.ages.tokens_N == 0, fired)
    return trainer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dead", [0, 2, 11])
def test_float64_gradients_equal_dense_autograd(shape: tuple[int, int, int, int], dead: int) -> None:
    check_step(shape, torch.float64, "fp32", 1e-9, dead=dead)


@pytest.mark.parametrize(("precision", "eight_bits"), [("fp32", False), ("exact", False), ("exact", True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_gradients_equal_dense_autograd(
    shape: tuple[int, int, int, int], precision: str, eight_bits: bool
) -> None:
    check_step(shape, torch.float32, precision, 1e-5, eight_bits=eight_bits)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_gradients_with_dead_latents(shape: tuple[int, int, int, int]) -> None:
    check_step(shape, torch.float32, "fp32", 1e-5, dead=9, clip=1e-3)


def test_exact_step_differs_only_in_dead_latents_by_bfloat16() -> None:
    """The dead-latent loss is multiplied in bfloat16; latents that are alive keep their float32 gradients."""
    with pytest.raises(AssertionError):
        check_step((300, 24, 512, 7), torch.float32, "exact", 1e-5, dead=9)
    check_step((300, 24, 512, 7), torch.float32, "exact", 1e-2, dead=9)


@pytest.mark.parametrize("clip", [1e-4, 1e-2, 1e3])
def test_clipping_is_exact(clip: float) -> None:
    check_step((37, 19, 53, 5), torch.float64, "fp32", 1e-6 / clip if clip < 1 else 1e-9, dead=4, clip=clip)


def all_negative(sae: TopKSAE, x: Tensor) -> None:
    sae.encoder.bias -= 100.0


def ties(sae: TopKSAE, x: Tensor) -> None:
    sae.encoder.weight[1::2] = sae.encoder.weight[::2][: len(sae.encoder.weight[1::2])]
    sae.encoder.bias.zero_()


def equal_rows(sae: TopKSAE, x: Tensor) -> None:
    x[3:] = x[3]


@pytest.mark.parametrize("change", [all_negative, ties, equal_rows])
@pytest.mark.parametrize(("precision", "eight_bits"), [("fp32", False), ("exact", False), ("exact", True)])
def test_odd_batches(change: Any, precision: str, eight_bits: bool) -> None:
    check_step((40, 16, 64, 6), torch.float32, precision, 1e-5, change=change, eight_bits=eight_bits)


def test_bf16_step_is_near_autograd() -> None:
    """bfloat16 selects a few other latents, so only the direction of the gradient is compared."""
    rows, hidden, latents, k = 300, 32, 512, 8
    sae, x = make_sae(hidden, latents, k, torch.float32), make_rows(rows, hidden, torch.float32)
    trainer = SAETrainer(sae, 1e-3, precision="bf16", clip_norm=None)
    trainer.step(x)
    reference = DenseTrainer(sae, clip=None)
    wanted = reference.gradients(reference.loss(x).loss)
    for name, gradient in first_gradient(trainer).items():
        assert torch.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0) > 0.99, name


def run_both(steps: int, **options: Any) -> tuple[list[float], list[float]]:
    """Loss curves of ours and of the dense reference on the same batches, aux-k in use."""
    hidden, latents, k, batch = 24, 96, 6, 64
    sae = make_sae(hidden, latents, k, torch.float32)
    trainer = SAETrainer(sae, 1e-3, precision="fp32", aux_k=12, dead_after_tokens=5 * batch, **options)
    reference = DenseTrainer(sae, 1e-3, aux_k=12)
    generator = torch.Generator().manual_seed(8)
    mix = torch.randn(48, hidden, generator=generator)
    ages = torch.zeros(latents, dtype=torch.int64)
    ours, theirs = [], []
    for _ in range(steps):
        x = torch.relu(torch.randn(batch, 48, generator=generator) - 1) @ mix
        dead = ages >= 5 * batch
        result = reference.step(x, dead)
        ages = torch.where((result.codes > 0).any(0), 0, ages + batch)
        theirs.append(float(result.loss.detach()))
        ours.append(float(trainer.step(x).loss))
    return ours, theirs


def test_thousand_steps_follow_torch_adam() -> None:
    ours, theirs = run_both(1000)
    assert theirs[-1] < 0.7 * theirs[0]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_bfloat16_moments_train_alike() -> None:
    ours, theirs = run_both(400, moments=torch.bfloat16)
    tail = slice(-50, None)
    assert sum(ours[tail]) == pytest.approx(sum(theirs[tail]), rel=0.02)


# Largest mean difference from Adam in float64 after 30 steps, in learning rates (the weights have moved by up to 30).
MOMENTS = [
    (torch.float64, None, 1e-6),
    (torch.float64, torch.float64, 1e-6),
    (torch.float32, None, 2e-2),
    (torch.float32, torch.float32, 2e-2),
    (torch.float16, None, 2e-2),
    (torch.bfloat16, torch.float32, 2e-2),
    (torch.float64, torch.bfloat16, 0.5),
    (torch.float32, torch.bfloat16, 0.5),
]


@pytest.mark.parametrize(("dtype", "moments", "tolerance"), MOMENTS)
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("cautious", [False, True])
def test_every_dtype_trains_as_torch_adam_in_float64(
    dtype: torch.dtype, moments: torch.dtype | None, tolerance: float, clip: float | None, cautious: bool
) -> None:
    """A cautious step leaves what the gradient contradicts; near 0 the dtype decides its sign, for a few entries."""
    sae = make_sae(16, 64, 4, dtype)
    trainer = SAETrainer(sae, 1e-3, moments=moments, clip_norm=clip, precision="fp32", cautious=cautious)
    reference = DenseTrainer(sae.double(), 1e-3, clip=clip, cautious=cautious)
    masters = torch.float64 if dtype == torch.float64 else torch.float32
    for step in range(30):
        x = torch.randn(48, 16, generator=torch.Generator().manual_seed(step)).to(masters)
        assert trainer.step(x).fvu.dtype == masters
        reference.step(x.double())
    for name, wanted in reference.parameters.items():
        off = (trainer.weights[name].double() - wanted.detach()).abs().mean()
        assert float(off) < tolerance * 1e-3, name
        assert trainer.weights.means[name].dtype == trainer.weights.squares[name].dtype == (moments or masters)


@pytest.mark.parametrize(
    ("dtype", "moments"),
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float64), (torch.float64, torch.float32)],
)
def test_moments_that_are_neither_the_weights_dtype_nor_bfloat16_are_refused(
    dtype: torch.dtype, moments: torch.dtype
) -> None:
    with pytest.raises(TrainingError, match="impossible value of moments"):
        SAETrainer(TopKSAE(16, 64, 4).to(dtype), 1e-3, moments=moments)


def test_a_small_change_moves_a_bfloat16_second_moment_on_average() -> None:
    """At a learning rate of 0 both see the same gradients; 0.1 % a step is below half a unit of bfloat16's last place.

    The batches shrink, so that the exact trainer's second moments change slowly: rounding to nearest would stop them.
    """
    sae = make_sae(24, 96, 6, torch.float32)
    exact, rounded = (
        SAETrainer(sae, 0.0, precision="fp32", clip_norm=None, moments=moments, betas=(0.9, 0.999))
        for moments in (torch.float32, torch.bfloat16)
    )
    x = make_rows(64, 24, torch.float32)
    for step in range(700):
        for trainer in (exact, rounded):
            trainer.step(x if step < 100 else x[step % 8 : step % 8 + 2])
    for name in ("encoder", "decoder"):
        wanted, found = exact.weights.squares[name].double(), rounded.weights.squares[name].double()
        assert float(found.sum()) == pytest.approx(float(wanted.sum()), rel=0.01), name


def test_stochastic_rounding_keeps_the_mean_and_takes_neighbours() -> None:
    x = torch.logspace(-8, 4, 50) * 1.2345
    drawn = torch.stack([stochastic_bfloat16(x.repeat(40), torch.tensor(float(step))) for step in range(1, 200)])
    below = (x.view(torch.int32) & -0x10000).view(torch.float32)
    above = (below.view(torch.int32) + 0x10000).view(torch.float32)
    values = drawn.float().view(-1, 50)
    assert bool(((values == below) | (values == above)).all())
    # The mean of 7,960 draws is off by at most 4.5 standard errors, each half a step at most.
    assert bool(((values.double().mean(0) - x).abs() < 4.5 * 0.5 * (above - below) / 7960**0.5).all())
