"""A tiny suite on a tiny language model, and a corpus in which one word is planted, for features and their browser."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from by_layer import residual_streams
from safetensors.torch import load_file, save_file
from tiny_run import make_language_model, tiny_recipe
from transformers import AutoTokenizer

from qwenscope.files import write_text
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.sae.sae import TopKSAE

PLANTED = " that"
PLANTED_LATENT = 7
WORDS = ["order", "status", "query", "error", "title", "content", "search", "system", "example", "release"]
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "order"}}}


def make_corpus(path: Path, conversations: int = 24, hostile: bool = False) -> Path:
    """Chats and tool calls of a few words, an eighth of them the planted one; `hostile` adds HTML to every turn."""
    choose = random.Random(0)
    lines = []
    for number in range(conversations):
        words = [PLANTED if choose.random() < 0.125 else " " + choose.choice(WORDS) for _ in range(30)]
        text = "".join(words).strip() + (f" {HOSTILE}" if hostile else "")
        messages = [{"role": "user", "content": f"{number} {text}"}, {"role": "assistant", "content": text[::-1]}]
        row: dict[str, object] = {"messages": messages}
        if number % 3 == 0:
            messages[1:] = [
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "name": "search", "content": text},
                {"role": "assistant", "content": "done"},
            ]
            row["tools"] = [TOOL]
        lines.append(json.dumps(row))
    write_text(path, "\n".join(lines) + "\n")
    return path


def make_release(folder: Path, corpus: Path, hostile: bool = False) -> Path:
    """A release of two random SAEs, but for latent PLANTED_LATENT of sae_delta, which reads the planted word.

    `hostile`: one token of the vocabulary is HTML.
    """
    model = _loud_word(make_language_model(folder / "lm"))
    if hostile:
        _hostile_token(model)
    recipe = tiny_recipe(model, corpus__batch_tokens=1024)
    release = folder / "release"
    release.mkdir()
    write_text(release / "recipe.yaml", recipe.to_yaml())
    lm = load_language_model(recipe.lm)
    for sae_id, point in recipe.hook_points.items():
        sae = TopKSAE(lm.hidden_dim, point.dict_size, point.k, seed=point.layer)
        if sae_id == "sae_delta":
            _plant(sae, lm, point.layer, corpus)
        sae.save(release / sae_id)
    return release


def _hostile_token(model: Path) -> None:
    """Rename one added token of the tokenizer to a piece of HTML."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    (token,) = [token for token in tokenizer["added_tokens"] if token["content"] == "<think>"]
    token["content"] = HOSTILE
    vocabulary = tokenizer["model"]["vocab"]
    if "<think>" in vocabulary:
        vocabulary[HOSTILE] = vocabulary.pop("<think>")
    path.write_text(json.dumps(tokenizer))


def _loud_word(model: Path) -> Path:
    """Make the planted word's embedding ten times as long, so that a line through a random model can tell it apart."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    weights = load_file(model / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    weights[name][tokenizer(PLANTED).input_ids[0]] *= 10
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


@torch.no_grad()
def _plant(sae: TopKSAE, lm: LanguageModel, layer: int, corpus: Path) -> None:
    """Least squares on the planted word's rows against all others, and a threshold above the highest of the others."""
    rows, planted = [], []
    for line in corpus.read_text().splitlines():
        messages = json.loads(line)["messages"]
        ids = torch.tensor([lm.tokenizer.apply_chat_template(messages, return_dict=False)])
        rows.append(residual_streams(lm, ids, [layer])[layer][0, 1:])
        planted.append(torch.tensor([lm.tokenizer.decode([id]) == PLANTED for id in ids[0, 1:].tolist()]))
    rows_RD, planted_R = torch.cat(rows), torch.cat(planted)
    mean_D = rows_RD.mean(0)
    targets_R1 = planted_R.float().unsqueeze(1) - planted_R.float().mean()
    direction_D = 100 * torch.linalg.lstsq(rows_RD - mean_D, targets_R1).solution.squeeze(1)
    sae.encoder.weight[PLANTED_LATENT] = direction_D
    sae.encoder.bias[PLANTED_LATENT] = -(rows_RD @ direction_D)[~planted_R].max()
