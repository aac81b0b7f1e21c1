"""`harvest` and `intervene` on a plain transformers model, against its own hidden states and a hook written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, Qwen3_5MoeForCausalLM

import qwenscope
from qwenscope.errors import CorpusError, ModelError
from qwenscope.lm.sites import Site
from qwenscope.lm.standin import STANDIN_FOLDER

TEXTS: list[Any] = [
    "The capital of France is Paris.",
    [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hello."}],
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return Qwen3_5MoeForCausalLM.from_pretrained(STANDIN_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(STANDIN_FOLDER)


@torch.no_grad()
def test_rows_are_the_models_own_hidden_states(model: PreTrainedModel, tokenizer: Any) -> None:
    found = qwenscope.harvest(model, tokenizer, TEXTS, ["layers.6", 2])
    texts = [tokenizer(TEXTS[0]).input_ids, tokenizer.apply_chat_template(TEXTS[1], return_dict=True)["input_ids"]]
    assert found.conversation_R.bincount().tolist() == [len(ids) for ids in texts]
    for site, state in ((Site("layers.6"), 7), (Site("layers.2"), 3)):
        own = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[state][0] for ids in texts]
        torch.testing.assert_close(found.rows[site], torch.cat(own), rtol=0, atol=2e-5)


@torch.no_grad()
def test_an_edit_is_a_hook_and_goes_with_the_block(model: PreTrainedModel, tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    clean = model(ids).logits
    with qwenscope.intervene(model, {"layers.6": lambda x_CTD: x_CTD * 0.5}):
        edited = model(ids).logits
    handle = model.model.layers[6].register_forward_hook(lambda module, inputs, output: output * 0.5)
    by_hand = model(ids).logits
    handle.remove()
    assert torch.equal(edited, by_hand)
    assert not torch.equal(edited, clean)
    assert torch.equal(model(ids).logits, clean)


@pytest.mark.parametrize(
    ("texts", "sites", "error", "message"),
    [
        ([], ["layers.6"], CorpusError, "at least one"),
        ("one text", ["layers.6"], CorpusError, "a list of texts"),
        ([""], ["layers.6"], CorpusError, "no text to read"),
        (["text"], ["layers.99"], ModelError, "layer 99"),
        (["text"], ["heads.1"], ModelError, "heads.1"),
    ],
)
def test_what_cannot_be_harvested_is_one_line(
    model: PreTrainedModel, tokenizer: Any, texts: Any, sites: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        qwenscope.harvest(model, tokenizer, texts, sites)
