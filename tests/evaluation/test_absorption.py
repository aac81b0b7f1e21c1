"""Absorption is found where it was planted, is not where it was not, and is counted as its definition says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwenscope.evaluation.absorption import Direction, absorption, label_directions, main_latents
from qwenscope.evaluation.probing import Task
from qwenscope.sae.sae import SAE, TopKSAE

D, EACH, CONVERSATIONS, TOKENS = 48, 40, 40, 24
MAIN, ABSORBERS = 0, (1, 2, 3)
"""Latents; token t's own latent is t, and tokens 0 and 9 to 23 have no letter."""


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Each row is its token's own direction, and the letter's where its token is one of 1 to 8; three absorb later."""
    random = np.random.default_rng(4)
    token_R = random.integers(0, TOKENS, CONVERSATIONS * EACH)
    letter_R = (token_R >= 1) & (token_R <= 8)
    token_R[letter_R] = np.where(
        random.random(letter_R.sum()) < 0.12, token_R[letter_R] % 3 + 1, 4 + token_R[letter_R] % 5
    )
    x_RD = np.zeros((len(token_R), D), dtype=np.float32)
    x_RD[np.arange(len(token_R)), 1 + token_R] = 2
    x_RD[letter_R, 0] = 2
    return torch.from_numpy(x_RD), token_R, letter_R


def planted(absorbing: bool) -> SAE:
    """A latent for the letter and one for each token; an absorbing token's silences the letter's and writes it too."""
    sae = TopKSAE(D, D, 8, seed=0)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(D))
        sae.decoder.weight.copy_(torch.eye(D))
        if absorbing:
            for token in ABSORBERS:
                sae.encoder.weight[MAIN, 1 + token] = -2
                sae.decoder.weight[0, 1 + token] = 1
                sae.decoder.weight[:, 1 + token] /= 2**0.5
    return sae


def task_of(letter_R: np.ndarray) -> Task:
    held_R = np.arange(len(letter_R)) >= EACH * CONVERSATIONS * 0.7
    return Task("letter", letter_R, ~held_R, held_R)


def measured(sae: SAE, rows: tuple[torch.Tensor, np.ndarray, np.ndarray]) -> dict[str, float]:
    x_RD, _, letter_R = rows
    codes_RN = sae.encode(x_RD).dense().detach().numpy()
    labels = label_directions(x_RD, [task_of(letter_R)])
    assert main_latents(codes_RN, labels[0].task).tolist() == [MAIN]
    conversation_R = np.repeat(np.arange(CONVERSATIONS), EACH)
    found = absorption(sae, codes_RN, x_RD, labels, conversation_R, seed=1)
    return {name: float(counts.shares(np.ones((1, CONVERSATIONS)))["letter"][0]) for name, counts in found.items()}


def test_planted_absorption_is_found_and_only_there(rows: tuple[torch.Tensor, np.ndarray, np.ndarray]) -> None:
    _, token_R, letter_R = rows
    held_R = task_of(letter_R).held_R & letter_R
    share = np.isin(token_R[held_R], ABSORBERS).mean()
    assert share > 0.08
    found = measured(planted(absorbing=True), rows)
    assert found["absorbed"] == pytest.approx(share)
    assert found["silent"] == pytest.approx(share)
    assert found["random directions"] < share
    assert measured(planted(absorbing=False), rows) == {"absorbed": 0, "silent": 0, "random directions": 0}


def test_a_silent_latent_whose_label_nobody_carries_is_not_absorbed(
    rows: tuple[torch.Tensor, np.ndarray, np.ndarray],
) -> None:
    sae = planted(absorbing=True)
    with torch.no_grad():
        sae.decoder.weight.copy_(torch.eye(D))  # the tokens' latents write the token alone
        sae.decoder.weight[0, 1 + np.array(ABSORBERS)] = -0.1
    found = measured(sae, rows)
    assert found["absorbed"] == 0
    assert found["silent"] > 0.08


def test_counts_are_those_of_the_definition_row_by_row() -> None:
    random = np.random.default_rng(7)
    rows, latents, dim = 900, 24, 16
    sae = TopKSAE(dim, latents, 6, seed=2)
    x_RD = torch.from_numpy(random.normal(size=(rows, dim)).astype(np.float32))
    with torch.no_grad():
        sae.pre_bias.copy_(torch.from_numpy(random.normal(size=dim).astype(np.float32)) / 4)
    codes_RN = sae.encode(x_RD).dense().detach().numpy()
    positive_R = random.random(rows) < 0.4
    task = Task("letter", positive_R, np.arange(rows) < 300, np.arange(rows) >= 300)
    unit_D = random.normal(size=dim)
    unit_D /= np.linalg.norm(unit_D)
    label = Direction(task, unit_D, random.normal(size=rows))
    conversation_R = np.arange(rows) // 90
    found = absorption(sae, codes_RN, x_RD, [label], conversation_R, seed=3)
    main = main_latents(codes_RN, task)
    decoder = sae.decoder.weight.detach().numpy().astype(np.float64)
    absorbed, silent, looked = (np.zeros(10) for _ in range(3))
    for row in range(300, rows):
        projection = (x_RD[row].numpy() - sae.pre_bias.detach().numpy()) @ unit_D
        if not (positive_R[row] and label.score_R[row] > 0 and projection > 0):
            continue
        looked[row // 90] += 1
        if any(codes_RN[row, latent] > 0 for latent in main):
            continue
        silent[row // 90] += 1
        parts = [codes_RN[row, latent] * float(decoder[:, latent] @ unit_D) for latent in range(latents)]
        top = int(np.argmax(parts))
        cosine = decoder[:, top] @ unit_D / np.linalg.norm(decoder[:, top])
        absorbed[row // 90] += cosine >= 0.025 and parts[top] / projection >= 0.4
    assert 0 < absorbed.sum() < silent.sum() < looked.sum()
    for name, want in (("absorbed", absorbed), ("silent", silent)):
        hits_C, of_C = found[name].sums["letter"]
        assert (hits_C.tolist(), of_C.tolist()) == (want.tolist(), looked.tolist())
    weights = np.array([np.ones(10), random.integers(0, 3, 10)], dtype=float)
    share = found["absorbed"].shares(weights)["letter"]
    assert share == pytest.approx([absorbed.sum() / looked.sum(), weights[1] @ absorbed / (weights[1] @ looked)])
