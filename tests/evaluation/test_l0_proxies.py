"""The two L0 proxies equal brute force in numpy, however blocks and batches are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenscope.evaluation import l0_proxies
from qwenscope.evaluation.fidelity import Fidelity
from qwenscope.evaluation.l0_proxies import DecoderProjections, decoder_pairwise_cosine
from qwenscope.sae.sae import SAE, Codes, TopKSAE
from qwenscope.training.trainer import SAETrainer

BIN = 2**-12  # half a bin, relative to the value


def random_sae(dim: int, latents: int, activation: str = "topk", seed: int = 0) -> SAE:
    """With a bias, and decoder directions that are not of norm 1."""
    sae = SAE(dim, latents, 2, activation, seed=seed)
    random = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        sae.pre_bias.copy_(torch.randn(dim, generator=random))
        sae.decoder.weight.mul_(0.5 + torch.rand(latents, generator=random))
    return sae


def sae_with(decoder_ND: torch.Tensor) -> SAE:
    sae = TopKSAE(decoder_ND.shape[1], len(decoder_ND), 1, seed=0)
    with torch.no_grad():
        sae.decoder.weight.copy_(decoder_ND.T)
    return sae


def brute_force_cosine(sae: SAE) -> float:
    rows = sae.decoder.weight.detach().double().numpy().T
    total = 0.0
    for i in range(len(rows)):
        for j in range(i):
            total += abs(rows[i] @ rows[j]) / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
    return total / (len(rows) * (len(rows) - 1) / 2)


def brute_force_projections(sae: SAE, x: torch.Tensor) -> np.ndarray:
    """All B x N of them, the largest first."""
    decoder = sae.decoder.weight.detach().double().numpy()
    rows = x.double().numpy() - sae.pre_bias.detach().double().numpy()
    return np.sort((rows @ (decoder / np.linalg.norm(decoder, axis=0))).ravel())[::-1]


def counted(sae: SAE, x: torch.Tensor, batch: int) -> DecoderProjections:
    projections = DecoderProjections(sae)
    for part in torch.split(x, batch):
        projections.update(part)
    return projections


@pytest.mark.parametrize("block", [3, 7, 2048])
@pytest.mark.parametrize("latents", [2, 7, 23])
def test_the_pairwise_cosine_is_that_of_all_pairs(block: int, latents: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l0_proxies, "BLOCK", block)
    sae = random_sae(5, latents)
    assert decoder_pairwise_cosine(sae) == pytest.approx(brute_force_cosine(sae), rel=1e-6)


def test_the_pairwise_cosine_of_known_decoders() -> None:
    assert decoder_pairwise_cosine(sae_with(torch.eye(6))) == 0
    one = torch.tensor([3.0, 0, 4, 0])
    assert decoder_pairwise_cosine(sae_with(one.repeat(9, 1))) == pytest.approx(1)
    assert decoder_pairwise_cosine(sae_with(torch.stack([one, -one]))) == pytest.approx(1), "its sign does not matter"
    assert decoder_pairwise_cosine(sae_with(torch.stack([one, torch.zeros(4)]))) == 0, "a latent without direction"
    assert decoder_pairwise_cosine(sae_with(one[None])) is None


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu", "relu"])
def test_the_nth_projection_is_that_of_all_sorted(activation: str) -> None:
    sae, x = random_sae(6, 20, activation), 5 * torch.randn(101, 6) + 2
    projections, expected = counted(sae, x, 10), brute_force_projections(sae, x)
    for n in range(20):
        assert projections.nth(n) == pytest.approx(expected[n * 101], rel=BIN, abs=1e-5), n


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 9))
def test_counts_do_not_depend_on_how_rows_are_cut(rows: int, batch: int, seed: int) -> None:
    sae, x = random_sae(4, 8, seed=seed), torch.randint(-4, 5, (rows, 4)).float()
    with torch.no_grad():  # whole numbers throughout, so that the product does not depend on the batch either
        sae.decoder.weight.copy_(torch.eye(4).repeat(1, 2))
        sae.pre_bias.fill_(1)
    whole, cut = counted(sae, x, rows), counted(sae, x, batch)
    assert torch.equal(whole.counts, cut.counts)
    assert whole.rows == cut.rows == rows
    assert int(whole.counts.sum()) == rows * 8
    assert whole.nth(3) == cut.nth(3) == pytest.approx(brute_force_projections(sae, x)[3 * rows], rel=BIN, abs=1e-30)


def test_pieces_of_a_batch_are_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = random_sae(6, 20), torch.randn(50, 6)
    expected = brute_force_projections(sae, x)
    monkeypatch.setattr(l0_proxies, "_PROJECTIONS", 55)  # two rows at once
    assert counted(sae, x, 50).nth(10) == pytest.approx(expected[500], rel=BIN, abs=1e-5)


def test_the_unit_is_the_spread_of_the_rows() -> None:
    """So that a normalised SAE's figures are those of the scaled rows that it was trained on, whatever rows' units."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(400, 6, generator=random) * torch.rand(6, generator=random) + 3
    found = []
    for unit in (1.0, 1000.0):
        trainer = SAETrainer(TopKSAE(6, 12, 2, seed=0), 1e-3, normalise=True)
        trainer.calibrate(unit * x)
        sae = trainer.sae()
        fidelity = Fidelity(6, 12, ("row",))
        codes, none = sae.encode(unit * x), torch.zeros(len(x))
        fidelity.update(unit * x, Codes(codes.values, codes.indices, 12), sae.decode(codes), none, none.bool())
        assert fidelity.spread == pytest.approx(float(trainer.rms), rel=1e-5)
        found.append(counted(sae, unit * x, 100).figures(fidelity.spread))
        scaled = (unit * x - trainer.centre_D) / trainer.rms
        projections = np.sort((scaled @ sae.decoder.weight.detach()).double().numpy().ravel())[::-1]
        assert found[-1] is not None
        assert found[-1]["half"] == pytest.approx(projections[6 * 400], rel=2 * BIN, abs=1e-4)
        assert found[-1]["quarter"] == pytest.approx(projections[3 * 400], rel=2 * BIN, abs=1e-4)
    assert found[0] == pytest.approx(found[1], rel=2 * BIN, abs=1e-4)


def test_rows_that_do_not_vary_have_no_projection() -> None:
    sae = random_sae(6, 20)
    assert counted(sae, torch.ones(5, 6), 5).figures(0.0) is None
    assert DecoderProjections(sae).figures(Fidelity(6, 20, ("row",)).spread) is None
