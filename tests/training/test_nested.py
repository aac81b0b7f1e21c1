"""Matryoshka prefixes: the sparse step against dense autograd of the summed losses, records, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_autograd import leaves
from tiny_run import tiny_recipe
from torch import Tensor

from qwenscope import SAE, SAETrainer, load_suite
from qwenscope.errors import RecipeError, TrainingError
from qwenscope.recipe import load_recipe
from qwenscope.training.run import train as run_training

HIDDEN, LATENTS, K, BATCH = 160, 96, 5, 64  # two panels of columns


def make_sae(activation: str) -> SAE:
    sae = SAE(HIDDEN, LATENTS, K, activation, seed=3)
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        sae.encoder.weight += 0.2 * torch.randn(LATENTS, HIDDEN, generator=draw)
        sae.encoder.bias += 0.1 * torch.randn(LATENTS, generator=draw)
        sae.pre_bias += 0.3 * torch.randn(HIDDEN, generator=draw)
    return sae


def rows(count: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(99))
    on = (torch.rand(count, 40, generator=draw) < 0.2) * torch.rand(count, 40, generator=draw)
    return on @ directions + 0.05 * torch.randn(count, HIDDEN, generator=draw)


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
@pytest.mark.parametrize("prefixes", [(12, 40), (1, 2, 95, LATENTS), ()])
def test_gradients_equal_dense_autograd(activation: str, prefixes: tuple[int, ...]) -> None:
    sae, x = make_sae(activation).double(), rows(BATCH, 5).double()
    options: dict[str, Any] = {"precision": "fp32", "clip_norm": None, "aux_coefficient": 0.0}
    trainer = SAETrainer(sae, 1e-3, prefixes=prefixes, **options)
    metrics = trainer.step(x)
    parameters = leaves(sae)
    pre = ((x - parameters["pre_bias"]) @ parameters["encoder"].T + parameters["encoder_bias"]).relu()
    among, kept = (pre, K) if activation == "topk" else (pre.view(1, -1), K * BATCH)
    mask = torch.zeros_like(among).scatter(1, among.topk(kept, dim=1).indices, 1.0).view_as(pre)
    variance = (x - x.mean(0)).square().sum()
    losses = []
    for end in sorted({*prefixes, LATENTS}):
        x_hat = (pre * mask)[:, :end] @ parameters["decoder"][:end] + parameters["pre_bias"]
        losses.append((x - x_hat).square().sum() / variance)
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(metrics.fvu, losses[-1].detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics.loss, torch.stack(losses).sum().detach(), rtol=1e-12, atol=0)
    for name, value in parameters.items():
        wanted = value.grad
        assert wanted is not None
        if name == "decoder":
            wanted = wanted - (wanted * value.detach()).sum(1, keepdim=True) * value.detach()
        seen = trainer.weights.means[name] / 0.1
        assert float((seen - wanted).norm() / wanted.norm()) < 1e-9, name


def train(prefixes: tuple[int, ...], steps: int = 60) -> SAETrainer:
    trainer = SAETrainer(make_sae("topk"), 3e-3, precision="fp32", prefixes=prefixes, resample_every_steps=25)
    trainer.calibrate(rows(1000, 1))
    for step in range(steps):
        trainer.step(rows(BATCH, 100 + step))
    return trainer


def test_a_prefix_reconstructs_better_and_the_saved_sae_says_where_it_ends() -> None:
    def of_prefix(sae: SAE, end: int) -> float:
        x = rows(500, 7)
        with torch.no_grad():
            codes_BN = sae.encode(x).dense()
            x_hat = codes_BN[:, :end] @ sae.decoder.weight.T[:end] + sae.pre_bias
            return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())

    nested, plain = train((16, 48)).sae(), train(()).sae()
    assert of_prefix(nested, 16) < 0.95 * of_prefix(plain, 16)
    assert nested.config["prefixes"] == [16, 48, LATENTS]
    assert "prefixes" not in plain.config


def test_a_resumed_trainer_goes_on_to_the_same_bits() -> None:
    whole, resumed = train((16, 48)), train((16, 48), steps=0)
    resumed.load_state_dict({name: value.clone() for name, value in train((16, 48), steps=30).state_dict().items()})
    for step in range(30, 60):
        resumed.step(rows(BATCH, 100 + step))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_run_trains_by_its_prefixes_and_records_them(model: Path, tmp_path: Path) -> None:
    run_training(tiny_recipe(model, training__prefixes=[32, 96]), tmp_path / "run")
    found = {sae_id: sae.config["prefixes"] for sae_id, sae in load_suite(tmp_path / "run").items()}
    assert found == {"sae_attn": [32, 96, 192], "sae_delta": [32, 96, 256]}


@pytest.mark.parametrize("prefixes", [(0, 16), (32, 16), (16, 16), (16, LATENTS + 1), (-1,)])
def test_prefixes_that_do_not_nest_are_refused(prefixes: tuple[int, ...]) -> None:
    with pytest.raises(TrainingError, match="must rise from 1 or more to at most 96"):
        SAETrainer(make_sae("topk"), 1e-3, prefixes=prefixes)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.prefixes=[64, 32]", r"training.prefixes \[64, 32\] must rise"),
        ("training.prefixes=[64, 9999]", "training.prefixes 9999 exceeds the dict_size"),
        ("training.prefixes=[0]", "training.prefixes"),
    ],
)
def test_recipes_name_the_prefix_at_fault(override: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        load_recipe("standin", [override])
    with pytest.raises(RecipeError, match=r"leave training\.latents_per_rank out"):
        load_recipe("standin", ["training.prefixes=[64]", "training.latents_per_rank=128"])
    assert load_recipe("standin", ["training.prefixes=[64, 128]"]).training.prefixes == (64, 128)
