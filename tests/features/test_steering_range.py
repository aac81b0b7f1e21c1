"""The range of strengths, against passes and texts made by hand; and where the assistant's turn begins."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from planted_suite import CALL, PLANTED_LATENT, TOOL

from qwenscope.errors import FormatError
from qwenscope.features.continuation import answer_start, generate, prompt_tokens, write_on
from qwenscope.features.steering import Steering, steer
from qwenscope.features.steering_range import DISTINCT, LADDER, NATS, Range, Trial, text_range
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target

PROMPT = "order status"


def push_of(target: Target, latent: int) -> Steering:
    return Steering(site=target.sites["sae_delta"], sae=target.saes["sae_delta"], latent=latent)


@pytest.mark.parametrize("latent", [PLANTED_LATENT, 40])
def test_trials_are_greedy_texts_judged_by_the_unsteered_model(lm: LanguageModel, target: Target, latent: int) -> None:
    push, ids = push_of(target, latent), prompt_tokens(lm, PROMPT)
    found = text_range(lm, ids, push, max_new_tokens=12)
    assert {trial.strength for trial in found.trials} >= set(LADDER)
    assert [trial.strength for trial in found.trials] == sorted(trial.strength for trial in found.trials)
    own = found.unsteered
    assert (own.kl, own.changed) == (pytest.approx(0, abs=1e-6), False)
    for trial in (own, *found.trials[::4]):
        steerings = [replace(push, strength=trial.strength)] if trial.strength else []
        steps = [step for step in write_on(lm, ids, [steerings], 12) if not step.ends]
        assert trial.text == "".join(step.text for step in steps)
        written = [step.token for step in steps]
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, len(ids) - 1 : -1]
        clean = logits.double().log_softmax(-1)
        nats = [-float(clean[t, token]) for t, token in enumerate(written)]
        assert trial.surprise == pytest.approx(sum(nats) / len(nats) if nats else 0, rel=1e-4)
        steered = [step.logits_V.double().log_softmax(0) for step in steps]
        kl = [float((one.exp() * (one - clean[t])).sum()) for t, one in enumerate(steered)]
        assert trial.kl == pytest.approx(sum(kl) / len(kl) if kl else 0, rel=1e-3, abs=1e-6)
        pairs = list(pairwise(written))
        distinct = len(set(pairs)) / len(pairs) if pairs else 1
        assert trial.distinct == distinct
        assert trial.changed == (trial.text != own.text)
        if trial is not own:
            assert trial.is_text == (trial.surprise <= own.surprise + NATS and distinct >= min(DISTINCT, own.distinct))


def trial(strength: float, kl: float, changed: bool, is_text: bool = True) -> Trial:
    return Trial(strength, "", 1.0, kl, 1.0, changed, is_text)


def test_the_start_is_the_strongest_that_changes_and_stays_within_the_bound() -> None:
    trials = [trial(0.1, 0.1, False), trial(0.2, 0.4, True), trial(0.4, 0.9, True), trial(0.8, 1.5, True)]
    broken, after = trial(1.6, 9.0, True, is_text=False), trial(3.2, 0.5, True)
    found = Range(trial(0, 0, False), (*trials, broken, after))
    assert (found.weakest, found.strongest, found.start) == (0.2, 0.8, 0.4)
    assert found.sound == tuple(trials)
    assert Range(trials[0], (trials[0], trials[3])).start is None
    assert Range(trials[0], (broken,)).strongest is None
    circling = trial(0.3, 0.5, True, is_text=False)
    assert Range(trials[0], (trials[0], circling, trials[3])).start == 0.3
    assert Range(trials[0], (broken, after)).start is None


def test_the_assistants_turn_begins_behind_the_users(lm: LanguageModel) -> None:
    whole, start = prompt_tokens(lm, PROMPT), answer_start(lm, PROMPT)
    asked = lm.tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], return_dict=False)
    assert whole[:start] == asked
    assert "assistant" in lm.tokenizer.decode(whole[start:])


def test_a_conversation_is_written_on(lm: LanguageModel) -> None:
    """With its tools, from the beginning of the assistant's turn; a last turn of the assistant goes on."""
    asked = [{"role": "system", "content": "You find orders."}, {"role": "user", "content": "order status"}]
    called = [*asked, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "done"}]
    for messages in (asked, called):
        whole, start = prompt_tokens(lm, messages, [TOOL]), answer_start(lm, messages, [TOOL])
        rendered = lm.tokenizer.apply_chat_template(messages, tools=[TOOL], return_dict=False)
        assert whole[:start] == rendered
        assert lm.tokenizer.decode(whole[start:]).strip() == "<|im_start|>assistant"
    begun = [*asked, {"role": "assistant", "content": "The order"}]
    whole, start = prompt_tokens(lm, begun), answer_start(lm, begun)
    assert whole[:start] == lm.tokenizer.apply_chat_template(asked, return_dict=False)
    assert lm.tokenizer.decode(whole).endswith("assistant\nThe order")
    assert prompt_tokens(lm, asked[1:]) == prompt_tokens(lm, "order status")
    with pytest.raises(FormatError, match="unknown_role"):
        prompt_tokens(lm, [{"role": "nobody", "content": "x"}])
    plain = copy.copy(lm.tokenizer)
    plain.chat_template = None
    with pytest.raises(FormatError, match="has no chat template"):
        prompt_tokens(replace(lm, tokenizer=plain), asked)


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
