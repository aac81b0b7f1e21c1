"""On the stand-in: a planted latent has the largest effect, pooled counts are a loop's, shuffles find nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted_piles import CASES, LATENTS, PLANTED, SITE, Planted

from qwenscope.analysis.pooling import Pool, Scope, scoped_rows
from qwenscope.analysis.statistics import Design, effects, permutation_test
from qwenscope.corpus.conversation import ROLES
from qwenscope.lm.forward import site_rows
from qwenscope.sae.sae import TopKSAE


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted.load()


@torch.no_grad()
def pooled(planted: Planted, kind: str, which: int, each: int = 12) -> tuple[Pool, np.ndarray]:
    piles = planted.piles(kind, which, start=300, each=each)
    pool = Pool.empty(2 * each, LATENTS)
    for plain_RD, x_RD, conversation_R in planted.rows(piles, kind, which):
        pool.add_codes(planted.sae(plain_RD, which).encode(x_RD), conversation_R)
    return pool, piles.positive_C


@pytest.mark.parametrize(("kind", "which"), CASES)
def test_the_planted_latent_comes_first(planted: Planted, kind: str, which: int) -> None:
    pool, positive_C = pooled(planted, kind, which)
    design = Design(positive_C, False)
    effect_N = effects(pool.by("max"), design)
    best = effect_N.abs().argsort(descending=True)[:3].tolist()
    assert best[0] == PLANTED, (best, effect_N[best])
    assert permutation_test(pool.by("max"), design, 0).q_F[PLANTED] <= 0.05


def test_shuffled_labels_find_nothing(planted: Planted) -> None:
    pool, positive_C = pooled(planted, "phrase", 0)
    features_CN = pool.by("max")[:, (pool.active_CF > 0).sum(0) >= 3]
    random = np.random.default_rng(0)
    shuffled = [
        permutation_test(features_CN, Design(random.permutation(positive_C), False), run).q_F for run in range(100)
    ]
    assert sum(bool((q_F <= 0.05).any()) for q_F in shuffled) <= 8


def test_pooled_counts_are_those_of_a_loop(planted: Planted) -> None:
    sae = TopKSAE(64, LATENTS, 8, seed=0)
    piles = planted.piles("tool", 1, start=300, each=4)
    scope = Scope(("assistant", "tool_call"), start=2, stop=-3)
    pool = Pool.empty(8, sae.dict_size)
    dense = Pool.empty(8, sae.hidden_dim, -float("inf"))
    with torch.no_grad():
        for part in scoped_rows(planted.lm, piles.conversations, [SITE], scope, planted.recipe):
            pool.add_codes(sae.encode(part.rows[SITE]), part.conversation_R)
            dense.add_dense(part.rows[SITE], part.conversation_R)
        for c, conversation in enumerate(piles.conversations):
            x_TD = site_rows(planted.lm, torch.from_numpy(conversation.token_ids).long()[None], [SITE])[SITE][0]
            wanted = [t for t, role in enumerate(conversation.roles) if ROLES[role] in scope.roles and t > 0][2:-3]
            codes_TN = sae.encode(x_TD[wanted]).dense()
            assert pool.tokens_C[c] == len(wanted)
            assert torch.equal(pool.active_CF[c], (codes_TN > 0).sum(0).int())
            assert torch.allclose(pool.by("max")[c], codes_TN.amax(0), atol=1e-3)
            assert torch.allclose(pool.by("mean")[c], codes_TN.mean(0), atol=1e-3)
            assert torch.allclose(dense.by("max")[c], x_TD[wanted].amax(0), atol=1e-3)
            assert torch.allclose(dense.by("mean")[c], x_TD[wanted].mean(0), atol=1e-3)
