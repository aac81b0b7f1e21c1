"""Routing and recurrent state, measured from outside the library's own hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_cases import LAYER_OF, SITE_OF, conversation, identity_sae

from qwenscope.evaluation.downstream import recurrent_states
from qwenscope.evaluation.measure import SplitMeter
from qwenscope.lm.hooks import find_routers, intervene


def route(lm, token_ids, edits=None):
    """One conversation alone through the routers themselves: {layer: (probabilities, chosen experts)}."""
    seen = {}

    def keep(layer):
        def hook(_module, _inputs, output):
            seen[layer] = output[0].double().softmax(-1), output[-1]

        return hook

    handles = [block.mlp.gate.register_forward_hook(keep(layer)) for layer, block in enumerate(lm.layers)]
    with intervene(lm, edits or {}), torch.no_grad():
        lm.model(input_ids=torch.from_numpy(token_ids).long()[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_every_layer_of_the_mixture_has_its_router(lm) -> None:
    routers = find_routers(lm)
    assert list(routers) == list(range(8))
    assert all(router is lm.layers[layer].mlp.gate for layer, router in routers.items())


def test_routing_shift_equals_single_conversations(lm, recipe, conversations) -> None:
    saes = {sae_id: identity_sae(0.6) for sae_id in LAYER_OF}
    routing = SplitMeter(lm, saes, SITE_OF, conversations, recipe).run().routing
    clean = [route(lm, c.token_ids) for c in conversations]
    for sae_id, layer in LAYER_OF.items():
        found = routing[sae_id]
        spliced = [route(lm, c.token_ids, {layer: lambda x: x * 0.6}) for c in conversations]
        assert found["layers"] == list(range(layer + 1, 8))
        for above, overlap, kl in zip(found["layers"], found["overlap"], found["kl"], strict=True):
            shared, divergence = [], []
            for whole, edited in zip(clean, spliced, strict=True):
                (p, before), (q, after) = whole[above], edited[above]
                shared += [len(set(a.tolist()) & set(b.tolist())) / 2 for a, b in zip(before, after, strict=True)]
                divergence.append((p * (p / q).log()).sum(1))
            assert overlap == pytest.approx(np.mean(shared), abs=0.02), "rounding may swap experts that tie"
            assert kl == pytest.approx(float(torch.cat(divergence).mean()), rel=1e-2)


def delta_rule(lm, layer, token_ids, edits):
    """The recurrent state after the last token by the recurrence itself (Yang et al. 2024), token by token."""
    mixer = lm.layers[layer].linear_attn
    caught = []
    handle = mixer.register_forward_pre_hook(
        lambda _m, args, kwargs: caught.append(kwargs.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    with intervene(lm, edits), torch.no_grad():
        lm.model(input_ids=torch.from_numpy(token_ids).long()[None], use_cache=False)
    handle.remove()
    x = caught[0]
    qkv = torch.nn.functional.silu(mixer.conv1d(mixer.in_proj_qkv(x).transpose(1, 2))[..., : x.shape[1]]).transpose(
        1, 2
    )
    _, key, value = qkv[0].double().split([mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    heads = mixer.num_v_heads
    key = key.reshape(len(key), mixer.num_k_heads, -1).repeat_interleave(heads // mixer.num_k_heads, 1)
    key = key * (key.pow(2).sum(-1, keepdim=True) + 1e-6).rsqrt()
    value = value.reshape(len(value), heads, -1)
    beta = mixer.in_proj_b(x)[0].double().sigmoid()
    rate = torch.nn.functional.softplus(mixer.in_proj_a(x)[0].double() + mixer.dt_bias)
    decay = (-mixer.A_log.double().exp() * rate).exp()
    state = torch.zeros(heads, key.shape[-1], value.shape[-1], dtype=torch.float64)
    for k, v, b, g in zip(key, value, beta, decay, strict=True):
        state = state * g[:, None, None]
        error = (v - torch.einsum("hkv,hk->hv", state, k)) * b[:, None]
        state = state + torch.einsum("hk,hv->hkv", k, error)
    return state


def test_recurrent_states_follow_the_delta_rule(lm) -> None:
    ids = conversation(70, 1).token_ids  # longer than one chunk of the parallel form
    states = recurrent_states(lm, torch.from_numpy(ids).long()[None])
    assert sorted(states) == [0, 1, 2, 4, 5, 6]
    for layer in (1, 6):
        torch.testing.assert_close(states[layer][0].double(), delta_rule(lm, layer, ids, {}), rtol=1e-3, atol=1e-4)


def test_state_shift_equals_the_delta_rule_with_and_without_the_splice(lm, recipe) -> None:
    conversations = [conversation(20, seed) for seed in range(3)]
    saes = {sae_id: identity_sae(0.6) for sae_id in LAYER_OF}
    states = SplitMeter(lm, saes, SITE_OF, conversations, recipe).run().states
    assert states["sae_delta"]["layers"] == [4, 5, 6]
    assert "sae_delta_late" not in states, "no DeltaNet layer stands above it"
    shifts = []
    for c in conversations:
        before = delta_rule(lm, 5, c.token_ids, {})
        after = delta_rule(lm, 5, c.token_ids, {3: lambda x: x * 0.6})
        shifts.append(float((after - before).norm() / before.norm()))
    assert states["sae_attn"]["shift"][1] == pytest.approx(np.mean(shifts), rel=1e-2)
