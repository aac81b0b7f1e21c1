"""BatchTopK: the sparse step against dense autograd, resuming, and how many latents the threshold leaves active."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_autograd import leaves
from torch import Tensor

from qwenscope import SAE, SAETrainer
from qwenscope.errors import TrainingError
from qwenscope.sae.activation import ACTIVATIONS

HIDDEN, LATENTS, K, BATCH = 16, 96, 4, 128


def make_sae() -> SAE:
    sae = SAE(HIDDEN, LATENTS, K, "batch_topk", seed=3)
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        sae.encoder.weight += 0.2 * torch.randn(LATENTS, HIDDEN, generator=draw)
        sae.encoder.bias += 0.1 * torch.randn(LATENTS, generator=draw)
        sae.pre_bias += 0.3 * torch.randn(HIDDEN, generator=draw)
    return sae


def rows(count: int, seed: int, *, uneven: bool = False) -> Tensor:
    """Rows of some eight of 40 fixed directions; `uneven`: a few are so long that most latents active are theirs."""
    directions = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    on = (torch.rand(count, 40, generator=draw) < 0.2) * torch.rand(count, 40, generator=draw)
    x = on @ directions + 0.05 * torch.randn(count, HIDDEN, generator=draw)
    if uneven:
        x[:3] *= 30
    return x


@pytest.mark.parametrize("uneven", [False, True])
def test_gradients_equal_dense_autograd(uneven: bool) -> None:
    """Also where rows have more active latents than they have candidates at first."""
    sae, x = make_sae().double(), rows(BATCH, 5, uneven=uneven).double()
    trainer = SAETrainer(sae, 1e-3, precision="fp32", clip_norm=None, aux_coefficient=0.0)
    metrics = trainer.step(x)
    parameters = leaves(sae)
    pre = ((x - parameters["pre_bias"]) @ parameters["encoder"].T + parameters["encoder_bias"]).relu()
    kept = torch.zeros(BATCH * LATENTS, dtype=torch.bool).scatter(0, pre.flatten().topk(K * BATCH).indices, True)
    codes = pre * kept.view_as(pre)
    if uneven:
        assert int((codes > 0).sum(1).max()) > ACTIVATIONS["batch_topk"](K).candidates
    error = x - (codes @ parameters["decoder"] + parameters["pre_bias"])
    fvu = error.square().sum() / (x - x.mean(0)).square().sum()
    fvu.backward()
    torch.testing.assert_close(metrics.fvu, fvu.detach(), rtol=1e-12, atol=0)
    assert float(metrics.l0) == pytest.approx(K)
    for name, value in parameters.items():
        wanted = value.grad
        assert wanted is not None
        if name == "decoder":
            wanted = wanted - (wanted * value.detach()).sum(1, keepdim=True) * value.detach()
        seen = trainer.weights.means[name] / 0.1
        assert float((seen - wanted).norm() / wanted.norm()) < 1e-9, name
    assert float(trainer.active.threshold) == pytest.approx(float(codes.detach()[codes > 0].min()))


def untrained(steps: int, **options: Any) -> SAETrainer:
    trainer = SAETrainer(make_sae(), 3e-3, tokens=steps * BATCH, precision="fp32", **options)
    trainer.calibrate(rows(2000, 1))
    return trainer


def test_a_resumed_trainer_goes_on_to_the_same_bits() -> None:
    whole, halves, resumed = (untrained(40, normalise=True) for _ in range(3))
    for step in range(40):
        whole.step(rows(BATCH, 100 + step))
    for step in range(20):
        halves.step(rows(BATCH, 100 + step))
    resumed.load_state_dict({name: value.clone() for name, value in halves.state_dict().items()})
    for step in range(20, 40):
        resumed.step(rows(BATCH, 100 + step))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("steps", [250, 1000])
@pytest.mark.parametrize("normalise", [False, True])
def test_as_many_latents_are_active_on_held_out_rows(normalise: bool, steps: int) -> None:
    """The threshold, folded into the units of the rows, keeps k latents per row on average, within 2 %."""
    trainer = SAETrainer(make_sae(), 3e-3, tokens=steps * BATCH, precision="fp32", normalise=normalise)
    trainer.calibrate(5 * rows(2000, 1) + 2)
    for step in range(steps):
        trainer.step(5 * rows(BATCH, 1000 + step) + 2)
    codes = trainer.sae().encode(5 * rows(20_000, 7) + 2)
    assert abs(float((codes.values > 0).sum(1).float().mean()) / K - 1) < 0.02


def test_kinds_for_inference_are_not_trained() -> None:
    with pytest.raises(TrainingError, match="trains topk, batch_topk, not an SAE with jumprelu"):
        SAETrainer(SAE(HIDDEN, LATENTS, K, "jumprelu"), 1e-3)
