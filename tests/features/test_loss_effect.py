"""The effect of an ablation on the loss, against whole steered passes of single texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted_suite import PLANTED_LATENT

from qwenscope.errors import FormatError
from qwenscope.features.loss_effect import DRAWS, LONGEST, TOKENS, loss_effect
from qwenscope.features.steering import Steering, steer
from qwenscope.features.store import Index
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target


@pytest.mark.parametrize("latent", [PLANTED_LATENT, 5])
def test_the_change_is_that_of_steered_passes(index: Index, target: Target, lm: LanguageModel, latent: int) -> None:
    """All examples fit, so that brute force knows which texts are read."""
    found = loss_effect(index, target, lm, "sae_delta", latent)
    ends: dict[int, int] = {}
    for example in index.latent("sae_delta", latent)["examples"]:
        if example["kind"] != "negative":
            ends[example["start"]] = max(ends.get(example["start"], 0), example["position"] + 2)
    assert sum(ends.values()) <= TOKENS
    assert max(ends.values()) <= LONGEST
    sae = target.saes["sae_delta"]
    clean, changes, texts = [], [], 0
    for start, end in ends.items():
        ids = torch.tensor([index.conversation(start)["ids"][:end]])
        with torch.no_grad():
            states = lm.model(ids, output_hidden_states=True, use_cache=False)
            fires = (sae.encode(states.hidden_states[2][0]).dense()[:, latent] > 0).nonzero().flatten().tolist()
            at = [place for place in fires if 0 < place < ids.shape[1] - 1]
            with steer(
                lm, Steering(1, sae=sae, latent=latent, mode="ablate", where=[place for place in fires if place])
            ):
                ablated = lm.model(ids, use_cache=False).logits
        texts += bool(at)
        for place in at:
            losses = [-float(x[0, place].log_softmax(-1)[ids[0, place + 1]]) for x in (states.logits, ablated)]
            clean.append(losses[0])
            changes.append(losses[1] - losses[0])
    assert (found.positions, found.conversations) == (len(changes), texts)
    assert found.loss == pytest.approx(np.mean(clean), rel=1e-4)
    assert found.change == pytest.approx(np.mean(changes), rel=1e-3, abs=1e-5)
    assert found.interval[0] <= found.change <= found.interval[1]
    assert len(found.random_latent) == len(found.random_direction) == DRAWS
    assert all(np.isfinite([*found.random_latent, *found.random_direction]))
    assert loss_effect(index, target, lm, "sae_delta", latent) == found


def test_what_cannot_be_ablated_is_named(index: Index, target: Target, lm: LanguageModel) -> None:
    dead = sorted(set(range(256)) - set(index.alive("sae_delta")))
    with pytest.raises(FormatError, match=f"latent {dead[0]} of sae_delta has no example"):
        loss_effect(index, target, lm, "sae_delta", dead[0])
