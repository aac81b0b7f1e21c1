"""Checkpoints that are not what they seem: tied heads, foreign tokenizers, and models that are no causal decoders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from by_layer import residual_streams
from lm.tiny_models import DENSE, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from qwenscope.errors import ModelError
from qwenscope.lm.forward import final_hidden, logits
from qwenscope.lm.load import load_language_model
from qwenscope.recipe import LMRecipe

IDS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def save_llama(folder: Path, **config: Any) -> PreTrainedModel:
    """A tiny dense checkpoint with a tokenizer, in one file; the model as transformers keeps it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**DENSE, num_key_value_heads=1, **config)).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check_logits(folder: Path, model: PreTrainedModel) -> None:
    """The logits that are ours, of a whole and by way of a truncated model, are the model's own."""
    with torch.no_grad():
        want = model(IDS).logits
    lm = load_language_model(LMRecipe(model=str(folder)), lm_head=True)
    torch.testing.assert_close(logits(lm, final_hidden(lm, IDS)), want, rtol=1e-5, atol=1e-5)
    short = load_language_model(LMRecipe(model=str(folder)), last_layer=1)
    assert torch.equal(residual_streams(short, IDS, [1])[1], residual_streams(lm, IDS, [1])[1])


def test_a_head_of_its_own_counts_where_the_config_says_tied(tmp_path: Path) -> None:
    model = save_llama(tmp_path, tie_word_embeddings=False)
    set_config(tmp_path, tie_word_embeddings=True)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    check_logits(tmp_path, model)


def test_a_tied_tensor_may_stand_under_the_heads_name(tmp_path: Path) -> None:
    model = save_llama(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    check_logits(tmp_path, model)


@pytest.mark.parametrize("config", [{"return_dict": False}, {"output_hidden_states": True, "use_cache": False}])
def test_settings_of_the_outputs_change_nothing(tmp_path: Path, config: dict[str, Any]) -> None:
    model = save_llama(tmp_path)
    set_config(tmp_path, **config)
    check_logits(tmp_path, model)


def test_a_config_far_beyond_its_weights_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    save_llama(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # the sizes of a model of 7 B
    with pytest.raises(ModelError, match=r"^the config speaks of 6,738,415,616 weights, .* are there; it lacks sizes"):
        load_language_model(LMRecipe(model=str(tmp_path)), lm_head=True)


def test_a_tokenizer_of_more_ids_than_the_embedding_has_rows_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # id 96: no text has it
    tokenizer.save_pretrained(tmp_path)
    load_language_model(LMRecipe(model=str(tmp_path)), last_layer=0)
    tokenizer.add_tokens(["wide", "wider"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has 2 tokens beyond the model's 96, such as 'wide' \(97\)") as caught:
        load_language_model(LMRecipe(model=str(tmp_path)), last_layer=0)
    assert "\n" not in str(caught.value)


SMALL: dict[str, Any] = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
FOUR = {"num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
BOTH_WAYS = {**FOUR, "num_key_value_heads": 1, "head_dim": 16, "use_bidirectional_attention": True}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    **{f"{side}_{size}": 2 for side in ("encoder", "decoder") for size in ("layers", "attention_heads")},
    "d_model": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 0,
}


@pytest.mark.parametrize(
    ("auto", "family", "sizes", "named"),
    [
        (AutoModelForCausalLM, "gemma3_text", BOTH_WAYS, "looks ahead: it is no causal decoder"),
        (AutoModelForMaskedLM, "bert", FOUR, "(BertLMHeadModel) is no causal decoder, and not supported"),
        (AutoModelForMaskedLM, "modernbert", FOUR, "no causal language model (modernbert)"),
        (AutoModelForSeq2SeqLM, "t5", T5, "an encoder-decoder (t5)"),
        (AutoModelForSeq2SeqLM, "bart", BART, "an encoder-decoder (bart)"),
    ],
)
def test_what_is_no_causal_decoder_is_refused(
    tmp_path: Path, auto: Any, family: str, sizes: dict[str, Any], named: str
) -> None:
    auto.from_config(AutoConfig.for_model(family, **SMALL, **sizes)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=re.escape(named)) as caught:
        load_language_model(LMRecipe(model=str(tmp_path)), last_layer=1)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
