"""Families of language models, tiny and random, from `recipe --for` to steering, by documents and by conversations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm.families import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from qwenscope.activations.harvest import harvest
from qwenscope.cli.main import app
from qwenscope.errors import ModelError
from qwenscope.features.store import Index
from qwenscope.opening import open_target
from qwenscope.recipe import ActivationsRecipe

NO_TEMPLATE = ("gpt2", "gpt_neox", "olmo2", "mixtral", "qwen3_next", "deepseek_v3", "falcon_h1")
WITH_TEMPLATE = (
    *("llama", "gemma2", "gemma3_text", "mistral", "phi3", "qwen3_moe", "gpt_oss", "glm4_moe"),
    "granitemoehybrid",
)
FAST = {"gpt2", "gemma2"}
NO_BOS = {"gpt2", "gpt_neox", "olmo2", "qwen3_moe", "qwen3_next"}
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
LAYER = 1

_draw = random.Random(0)
_WORDS = ["".join(_draw.choices("aeiou mnrst", k=_draw.randint(2, 7))) for _ in range(300)]
TEXTS = [" ".join(_draw.choices(_WORDS, k=_draw.randint(5, 60))) for _ in range(1200)]


def save_tokenizer(folder: Path, bos: bool, template: str | None) -> PreTrainedTokenizerBase:
    """A byte-level BPE of 400 ids, without a pad token; with `bos` each text begins with <s>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def qwenscope(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize(
    ("family", "chat"),
    [
        pytest.param(family, chat, marks=() if family in FAST else pytest.mark.slow)
        for chat, families in ((False, NO_TEMPLATE), (True, WITH_TEMPLATE))
        for family in families
    ],
)
def test_a_family_from_its_recipe_to_steering(family: str, chat: bool, tmp_path: Path) -> None:
    folder, data, run = tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "run"
    model = tiny(family, vocab_size=400, pad_token_id=None, bos_token_id=0, eos_token_id=1)
    model.save_pretrained(folder)
    tokenizer = save_tokenizer(folder, family not in NO_BOS, TEMPLATE if chat else None)
    turns = ({"messages": [{"role": "user", "content": text}]} if chat else {"text": text} for text in TEXTS)
    data.write_text("".join(json.dumps(row) + "\n" for row in turns))

    written = qwenscope("recipe", "--for", folder, "--sites", LAYER, "--dict-size", 64, "--data", data)
    (tmp_path / "recipe.yaml").write_text(written)
    plan: dict[str, Any] = yaml.safe_load(written)
    assert 20_000 <= plan["training"]["tokens"] <= sum(len(tokenizer(text).input_ids) + 9 for text in TEXTS)
    assert plan["corpus"]["max_length"] == 64
    (sae_id,) = plan["hook_points"]
    smaller = ("--set", "training.tokens=20000", "--set", "training.batch_size=256", "--set", "training.warmup_steps=5")
    qwenscope("train", tmp_path / "recipe.yaml", "--out", run, *smaller)
    assert json.loads((run / "status.json").read_text())["tokens_trained"] == 20_000
    evaluation = json.loads(qwenscope("evaluate", run, "--tokens", 1000, "--json"))
    split = "chat" if chat else "text"
    assert list(evaluation["saes"][sae_id]) == [split]
    figures = evaluation["saes"][sae_id][split]
    assert 0 < figures["fvu"] < 1
    assert set(figures["roles"]) <= ({"user", "template"} if chat else {"text", "template"})

    check_rows(run, model, split)
    qwenscope("index", run, "--out", tmp_path / "index", "--tokens", 1000)
    index = Index(tmp_path / "index")
    latent = index.alive(sae_id)[0]
    detail = index.latent(sae_id, latent)
    assert sum(detail["roles"]) == sum(detail["splits"])
    assert {example["split"] for example in detail["examples"]} == {split}
    options = ("--sae", sae_id, "--latent", latent, "--strength", 4, "--max-new-tokens", 4)
    assert qwenscope("steer", run, *options, TEXTS[0][:20])


def check_rows(run: Path, model: Any, split: str) -> None:
    """Rows of a padded batch are transformers' own hidden states of each text alone; BOS stands once."""
    target = open_target(run)
    lm = target.language_model()
    rows = target.splits(lm.tokenizer, 800)[split]
    everything = ActivationsRecipe(outlier_factor=None, skip_first_position=False)
    found = harvest(lm, rows, list(target.sites.values()), everything, 2048)
    (x_RD,) = found.rows.values()
    for number, row in enumerate(rows):
        with torch.no_grad():
            ids = torch.from_numpy(row.token_ids.astype("int64"))[None]
            want = model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0]
        mine = x_RD[found.conversation_R == number]
        assert ((mine - want).norm(dim=-1) / want.norm(dim=-1)).max() < 5e-6
        if split == "text":
            assert row.token_ids.tolist() == lm.tokenizer(row.text).input_ids[: len(row.token_ids)]


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_encoders_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    if kind == "t5":
        config = T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    else:
        sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        BertModel(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, True, None)
    done = CliRunner().invoke(app, ["recipe", "--for", str(tmp_path)])
    if done.exit_code == 0:  # nothing in a config tells a BERT from a decoder
        (tmp_path / "recipe.yaml").write_text(done.stdout)
        done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")])
    assert isinstance(done.exception, ModelError)
    assert "not supported" in str(done.exception)
    assert len(str(done.exception).splitlines()) == 1
