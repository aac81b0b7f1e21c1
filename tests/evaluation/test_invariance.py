"""The normalised recipe does not depend on a residual stream's units: x -> a x + c gives the same quality."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from truth import ground_truth

from qwenscope.evaluation.fidelity import Fidelity
from qwenscope.recipe import load_recipe
from qwenscope.sae.sae import Codes, TopKSAE
from qwenscope.training.trainer import SAETrainer

DIM, LATENTS, K, BATCH, STEPS = 16, 64, 4, 128, 150
TRUTH = ground_truth(DIM, 48, active=4, noise=0.05, seed=3)
TRAIN, HELD_OUT = TRUTH.sample(BATCH * STEPS, seed=4)[0], TRUTH.sample(8192, seed=5)[0]


def trained(scale: float, shift_D: Tensor) -> SAETrainer:
    """The packaged normalised recipe's settings on scaled and shifted rows, at a small width."""
    recipe = load_recipe("qwen3.5-35b-a3b-normalised").training
    tokens = BATCH * STEPS
    trainer = SAETrainer(
        TopKSAE(DIM, LATENTS, K, seed=7),
        4e-3,
        tokens=tokens,
        warmup_tokens=tokens * recipe.warmup_steps * recipe.batch_size // recipe.tokens,
        decay_share=recipe.decay_share,
        aux_coefficient=recipe.aux_coefficient,
        normalise=recipe.normalise,
        betas=recipe.betas,
        eps=recipe.eps,
        clip_norm=recipe.clip_norm,
        precision="fp32",
    )
    trainer.calibrate(TRAIN[:4096] * scale + shift_D)
    for batch in TRAIN.split(BATCH):
        trainer.step(batch * scale + shift_D)
    return trainer


@torch.no_grad()
def fvu(sae: TopKSAE, x_BD: Tensor) -> float:
    fidelity, none = Fidelity(DIM, LATENTS, ("row",)), torch.zeros(len(x_BD))
    codes = sae.encode(x_BD)
    fidelity.update(x_BD, codes, sae.decode(codes), none, none.bool())
    return float(fidelity.figures()["fvu"])


@pytest.fixture(scope="module")
def plain() -> float:
    found = fvu(trained(1.0, torch.zeros(DIM)).sae(), HELD_OUT)
    assert found < 0.5, "learned something"
    return found


@settings(max_examples=6, deadline=None, derandomize=True)
@given(log_scale=st.floats(math.log(0.04), math.log(40.0)), seed=st.integers(0, 2**31), offset=st.floats(0.0, 10.0))
def test_units_do_not_change_the_fvu(plain: float, log_scale: float, seed: int, offset: float) -> None:
    """`offset`: the shift's size in standard deviations of the rows."""
    scale = math.exp(log_scale)
    shift_D = torch.randn(DIM, generator=torch.Generator().manual_seed(seed)) * offset * scale * float(HELD_OUT.std())
    found = fvu(trained(scale, shift_D).sae(), HELD_OUT * scale + shift_D)
    assert found == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("scale", [0.04, 1.0, 40.0])
def test_folding_changes_no_code_and_no_reconstruction(scale: float) -> None:
    trainer = trained(scale, torch.full((DIM,), 3.0 * scale))
    x_BD = HELD_OUT * scale + 3.0 * scale
    folded = trainer.sae()
    # What training computes, on rows centred and scaled as it does, before anything is folded.
    bare = TopKSAE(DIM, LATENTS, K, seed=0)
    state = trainer.state_dict()
    with torch.no_grad():
        bare.encoder.weight.copy_(state["encoder"])
        bare.encoder.bias.copy_(state["encoder_bias"])
        bare.decoder.weight.copy_(state["decoder"].T)
        bare.pre_bias.copy_(state["pre_bias"])
        rows_BD = (x_BD - state["centre"]) / state["rms"]
        expected, codes = bare.encode(rows_BD), folded.encode(x_BD)
        clear_B = _margin(bare, rows_BD) > 1e-4
        assert clear_B.float().mean() > 0.99
        assert torch.equal((codes.dense() > 0)[clear_B], (expected.dense() > 0)[clear_B])
        _close(codes, expected, float(state["rms"]), clear_B)
        wanted_BD = bare.decode(expected) * state["rms"] + state["centre"]
        torch.testing.assert_close(
            folded.decode(codes)[clear_B], wanted_BD[clear_B], rtol=2e-5, atol=2e-5 * float(x_BD.abs().mean())
        )


def _margin(sae: TopKSAE, x_BD: Tensor) -> Tensor:
    """How far each row's choice of latents is from another: the k-th value's distance to the next, and to 0."""
    values_BK = (sae.encoder(x_BD - sae.pre_bias)).topk(K + 1).values
    return torch.minimum(values_BK[:, K - 1] - values_BK[:, K], values_BK[:, :K].abs().min(1).values)


def _close(codes: Codes, expected: Codes, rms: float, clear_B: Tensor) -> None:
    torch.testing.assert_close(codes.dense()[clear_B], expected.dense()[clear_B] * rms, rtol=2e-4, atol=1e-5 * rms)
