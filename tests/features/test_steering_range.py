"""The range of strengths, against passes and texts made by hand; and where the assistant's turn begins."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from planted_suite import PLANTED_LATENT

from qwenscope.features.steering import Steering, answer_start, generate, prompt_tokens, steer
from qwenscope.features.steering_range import DISTINCT, LADDER, NATS, Trial, text_range
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target, open_target

PROMPT = "order status"


@pytest.fixture(scope="module")
def target(release: Path) -> Target:
    return open_target(release)


@pytest.fixture(scope="module")
def lm(target: Target) -> LanguageModel:
    return target.language_model()


def push_of(target: Target, latent: int) -> Steering:
    return Steering(site=target.sites["sae_delta"], sae=target.saes["sae_delta"], latent=latent)


@pytest.mark.parametrize("latent", [PLANTED_LATENT, 40])
def test_trials_are_greedy_texts_judged_by_the_unsteered_model(lm: LanguageModel, target: Target, latent: int) -> None:
    push, ids = push_of(target, latent), prompt_tokens(lm, PROMPT)
    told: list[Trial] = []
    found = text_range(lm, ids, push, max_new_tokens=12, on_trial=told.append)
    assert told == [found.unsteered, *found.trials]
    assert [trial.strength for trial in found.trials] == list(LADDER[: len(found.trials)])
    own = found.unsteered
    for trial in told:
        steerings = [replace(push, strength=trial.strength)] if trial.strength else []
        assert trial.text == "".join(generate(lm, ids, steerings, 12))
        written = lm.tokenizer(trial.text, add_special_tokens=False).input_ids
        with torch.no_grad():
            spread = lm.model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0].double()
        nats = [-math.log(float(spread[len(ids) + t - 1].softmax(0)[token])) for t, token in enumerate(written)]
        assert trial.surprise == pytest.approx(sum(nats) / len(nats) if nats else 0, rel=1e-4)
        pairs = list(pairwise(written))
        distinct = len(set(pairs)) / len(pairs) if pairs else 1
        assert trial.distinct == distinct
        assert trial.changed == (trial.text != own.text)
        if trial is not own:
            assert trial.is_text == (trial.surprise <= own.surprise + NATS and distinct >= min(DISTINCT, own.distinct))
    assert all(trial.is_text for trial in found.trials[:-1]), "the first broken text ends the search"
    kept = [trial.strength for trial in found.trials if trial.is_text]
    assert found.strongest == (kept[-1] if kept else None)
    changed = [trial.strength for trial in found.trials if trial.is_text and trial.changed]
    assert found.weakest == (changed[0] if changed else None)


def test_the_assistants_turn_begins_behind_the_users(lm: LanguageModel) -> None:
    whole, start = prompt_tokens(lm, PROMPT), answer_start(lm, PROMPT)
    asked = lm.tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], return_dict=False)
    assert whole[:start] == asked
    assert "assistant" in lm.tokenizer.decode(whole[start:])


def test_a_slice_steers_the_positions_that_it_names(lm: LanguageModel, target: Target) -> None:
    push = replace(push_of(target, 40), strength=0.5, where=slice(3, None))
    ids = torch.tensor([prompt_tokens(lm, PROMPT)])
    listed = replace(push, where=list(range(3, ids.shape[1])))
    with steer(lm, push), torch.no_grad():
        by_slice = lm.model(input_ids=ids, use_cache=False).logits
    with steer(lm, listed), torch.no_grad():
        by_list = lm.model(input_ids=ids, use_cache=False).logits
    plain = lm.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(by_slice, by_list)
    apart_T = (by_slice - plain)[0].abs().amax(1)
    assert float(apart_T[:3].max()) < 1e-5 < 1e-3 < float(apart_T[3:].min())
    ids = prompt_tokens(lm, PROMPT)
    behind = "".join(generate(lm, ids, [replace(push, where=slice(len(ids), None))], 8))
    assert behind == "".join(generate(lm, ids, [replace(push, where="decode")], 8)), "cached passes count on"
