"""The stand-in: what is shipped keeps its promises, and its training script learns."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from standin.data import (
    FILES,
    MARKERS,
    SPECIAL,
    NgramTables,
    batches,
    data_entries,
    pad_rows,
    render,
    rows_of,
)
from standin.model import grow, measure, standin_config
from standin.train import Optimizer, Stage, StandinPlan, train_standin
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenscope.corpus.tool_use import generate_tool_use
from qwenscope.errors import CorpusError
from qwenscope.files import read_json
from qwenscope.lm.standin import STANDIN_FOLDER

HOOKED = {
    6: "linear",
    7: "full",
    14: "linear",
    15: "full",
    21: "linear",
    22: "linear",
    23: "full",
    34: "linear",
    35: "full",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(STANDIN_FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(STANDIN_FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    return read_json(STANDIN_FOLDER / "DESCRIPTION.json")


# --- the shipped folder -------------------------------------------------------------------------------------------


def test_shipped_folder_is_small_and_complete() -> None:
    names = {path.name for path in STANDIN_FOLDER.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    } <= names
    assert {"DESCRIPTION.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in STANDIN_FOLDER.iterdir()) <= 10_000_000


def test_shipped_model_has_the_hybrid_pattern(model: Any) -> None:
    kinds = model.config.layer_types
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM"
    assert kinds == (["linear_attention"] * 3 + ["full_attention"]) * 10
    assert {layer: kinds[layer].removesuffix("_attention") for layer in HOOKED} == HOOKED
    assert next(model.parameters()).device.type == "cpu"
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_ids_agree_between_model_and_tokenizer(model: Any, tokenizer: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_shipped_model_is_far_below_the_bigram_table(description: dict[str, Any]) -> None:
    losses = description["loss"]
    assert set(losses) == {"all", "chat", "tool_use", "generated"}
    for name, loss in losses.items():
        margin = 0.2 if name == "chat" else 0.5  # open chat is the hardest text and gets the least of so small a model
        assert loss["model"] <= loss["bigram"] - margin, name
        assert loss["bigram"] < loss["unigram"] < math.log(4096), name


def test_described_loss_is_met_on_conversations_never_seen(
    model: Any, tokenizer: Any, description: dict[str, Any]
) -> None:
    texts = [render(tokenizer, conversation) for conversation in generate_tool_use(8, 20_260_101, held_out=True)]
    total, count = 0.0, 0
    for row in rows_of(tokenizer, texts, 512):
        with torch.no_grad():
            output = model(torch.tensor([row]), labels=torch.tensor([row]), use_cache=False)
        total, count = total + output.loss.item() * (len(row) - 1), count + len(row) - 1
    generated = description["loss"]["generated"]
    assert total / count < generated["bigram"] - 0.5
    assert total / count == pytest.approx(generated["model"], rel=0.35)  # the generator may have gained new wordings


def test_every_expert_of_every_layer_is_used(description: dict[str, Any]) -> None:
    assert description["expert_use"]["smallest"] > 0.01
    assert description["expert_use"]["largest"] < 0.5
    assert description["parameters"] < 4_700_000


def test_hooked_neighbours_differ(description: dict[str, Any]) -> None:
    cosines = description["centred_cosine"]
    assert set(cosines) == {"6/7", "14/15", "21/22", "22/23", "34/35"}
    assert all(0 < value < 0.95 for value in cosines.values()), cosines


def test_description_names_permissive_sources_only(description: dict[str, Any]) -> None:
    assert [Path(entry["file"]).name for entry in description["data"]] == list(FILES)
    for entry in description["data"]:
        assert entry["licence"].startswith(("Apache-2.0", "MIT"))
        assert len(entry["commit"]) == 40
        assert entry["repo"].count("/") == 1
    assert description["command"].startswith("qwenscope standin train")
    assert "/home" not in json.dumps(description)


# --- tokenizer and chat template ----------------------------------------------------------------------------------

CALLS = [{"type": "function", "function": {"name": name, "arguments": {"x": [1, {"y": "ü\n"}]}}} for name in ("f", "g")]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Do f and g."},
    {"role": "assistant", "content": "Both at once.", "tool_calls": CALLS},
    {"role": "tool", "name": "f", "content": "1"},
    {"role": "tool", "name": "g", "content": '{"a": 2}'},
    {"role": "assistant", "content": "Done.", "reasoning_content": "Easy."},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": None, "tool_calls": CALLS[:1]},
]
TOOLS = [{"type": "function", "function": {"name": name, "description": "Ü", "parameters": {}}} for name in ("f", "g")]


def text_of(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def test_template_renders_turns_calls_and_results(tokenizer: Any) -> None:
    text = text_of(tokenizer, MESSAGES, tools=TOOLS)
    turns = [turn.split("<|im_start|>")[1] for turn in text.split("<|im_end|>\n")[:-1]]
    assert [turn.split("\n")[0] for turn in turns] == [message["role"] for message in MESSAGES]
    assert [json.loads(line) for line in turns[0].splitlines()[-2:]] == TOOLS
    calls = [part.split("</tool_call>")[0] for part in turns[2].split("<tool_call>")[1:]]
    assert [json.loads(call) for call in calls] == [call["function"] for call in CALLS]
    assert turns[2].startswith("assistant\nBoth at once.\n<tool_call>")
    assert turns[3] == "tool\n<tool_response>\n1\n</tool_response>"
    assert turns[5] == "assistant\n<think>\nEasy.\n</think>\n\nDone."
    assert turns[7].startswith("assistant\n<tool_call>\n")


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("start", [0, 1])
def test_template_looks_at_nothing_ahead(tokenizer: Any, tools: Any, start: int) -> None:
    messages = MESSAGES[start:]
    whole = text_of(tokenizer, messages, tools=tools)
    lengths = [len(text_of(tokenizer, messages[:m], tools=tools)) for m in range(1, len(messages) + 1)]
    assert lengths == sorted(set(lengths))
    assert all(whole.startswith(text_of(tokenizer, messages[:m], tools=tools)) for m in range(1, len(messages)))


def test_generation_prompt_is_the_start_of_the_answer(tokenizer: Any) -> None:
    prompt = text_of(tokenizer, MESSAGES[:2], tools=TOOLS, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text_of(tokenizer, MESSAGES, tools=TOOLS).startswith(prompt)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "critic", "content": "no"}], "unknown role critic"),
        ([MESSAGES[1], MESSAGES[0]], "system message must come first"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "must be a string"),
        (
            [MESSAGES[1], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
            "mapping",
        ),
    ],
)
def test_template_refuses_what_it_would_render_wrongly(tokenizer: Any, messages: Any, said: str) -> None:
    with pytest.raises(Exception, match=said):
        text_of(tokenizer, messages)


@pytest.mark.parametrize(
    "text", ["Plain text 12345.", "  two  spaces\n\n\ttab ", "汉字 ü é 🙂 \u0000 \u200b", "<tool_call>x</think>"]
)
def test_tokenizer_loses_nothing(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_marks_are_single_tokens_and_only_three_are_special(tokenizer: Any) -> None:
    for mark in SPECIAL + MARKERS:
        assert len(tokenizer(mark, add_special_tokens=False)["input_ids"]) == 1
    ids = tokenizer("".join(SPECIAL + MARKERS), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(MARKERS)


# --- the parts of the training script -----------------------------------------------------------------------------


def test_batches_use_every_row_once_per_pass() -> None:
    rng = Random(5)
    rows = [[i + 1] * rng.randrange(16, 65) for i in range(57)]
    stream, seen = batches(rows, 256, pad=0, rng=Random(1)), []
    while len(seen) < len(rows):
        ids, mask = next(stream)
        assert ids.shape == mask.shape
        assert ids.shape[0] * (ids.shape[1] - 15) <= 256  # rows of a batch differ in length by up to 15
        assert bool((ids[~mask] == 0).all())
        seen += [(int(row[0]), int(real.sum())) for row, real in zip(ids, mask, strict=True)]
    assert sorted(seen) == [(row[0], len(row)) for row in rows]


def test_ngram_tables_are_distributions_and_match_a_naive_count() -> None:
    rng, size = Random(3), 7
    rows = [[rng.choice((0, 1, 1, 2, 3, 5)) for _ in range(15)] for _ in range(3)]
    tables = NgramTables(rows, size)
    pairs = Counter((a, b) for row in rows for a, b in pairwise(row))
    ones, twos = (sum(count == n for count in pairs.values()) for n in (1, 2))
    discount = ones / (ones + 2 * twos)
    assert 0 < discount < 0.9
    preceded = np.array([sum(b == token for _, b in pairs) + 0.1 for token in range(size)])

    def naive(a: int, b: int) -> float:
        total = sum(count for (first, _), count in pairs.items() if first == a)
        backoff = preceded[b] / preceded.sum()
        if total == 0:
            return float(backoff)
        followers = sum(first == a for first, _ in pairs)
        return float(max(pairs[a, b] - discount, 0) / total + discount * followers / total * backoff)

    for a in range(size):
        assert sum(naive(a, b) for b in range(size)) == pytest.approx(1)
        for b in range(size):
            assert tables.losses([[a, b]])[1] == pytest.approx(-math.log(naive(a, b)))
    assert sum(math.exp(-tables.losses([[0, b]])[0]) for b in range(size)) == pytest.approx(1)


def test_experts_in_one_tensor_are_updated_as_matrices_of_their_own() -> None:
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.experts, model.gain = torch.nn.Parameter(torch.zeros(3, 64, 32)), torch.nn.Parameter(torch.ones(8))
    model.experts.grad, model.gain.grad = torch.randn(3, 64, 32) * 1e-3, torch.full((8,), 1e-3)
    gradients = model.experts.grad.clone()
    Optimizer(model).step(1.0)
    for update, gradient in zip(-model.experts.detach(), gradients, strict=True):
        values = torch.linalg.svdvals(update) / (0.2 * 64**0.5)
        assert values.max() < 1.4
        assert (values > 0.5).float().mean() > 0.9
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(update.flatten(), (u @ vh).flatten(), dim=0) > 0.95
    assert torch.allclose(model.gain, torch.zeros(8), atol=1e-4)  # Adam's first step has the size of the rate
    assert model.experts.grad is None


TINY: dict[str, Any] = {
    "hidden_size": 32,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "num_experts": 4,
}


def test_growing_repeats_blocks_and_keeps_the_sum_of_their_outputs() -> None:
    torch.manual_seed(0)
    shallow = AutoModelForCausalLM.from_config(standin_config(300, num_hidden_layers=8, **TINY))
    deep = grow(shallow, 20)
    assert deep.config.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 5
    source = [0, 0, 0, 1, 1]
    for name in ("mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight"):
        for layer, block in enumerate(source):
            copy = deep.model.layers[4 * layer].get_parameter(name)
            original = shallow.model.layers[4 * block].get_parameter(name)
            torch.testing.assert_close(copy * source.count(block), original)
    assert deep.lm_head.weight.data_ptr() == deep.model.embed_tokens.weight.data_ptr()
    same = grow(shallow, 8)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(same(ids).logits, shallow(ids).logits, rtol=0, atol=0)


def test_short_training_learns_repeats_itself_and_describes_itself(tmp_path: Path) -> None:
    plan = StandinPlan(
        stages=(Stage(4, 16_000), Stage(8, 4_000, contrast=0.1)),
        vocab_size=384,
        generated=40,
        max_length=96,
        batch_tokens=768,
        config=TINY,
    )
    seen: list[tuple[int, int, float]] = []
    description = train_standin(
        None, tmp_path / "a", seed=3, plan=plan, progress=lambda done, total, loss: seen.append((done, total, loss))
    )
    assert seen[0][2] > seen[-1][2] + 0.5
    assert all(total == 20_000 for _, total, _ in seen)
    assert seen[-1][0] == description["trained_tokens"] >= 20_000
    assert description["loss"]["all"]["model"] < math.log(384)
    assert description == json.loads((tmp_path / "a" / "DESCRIPTION.json").read_text()) | {"plan": description["plan"]}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").config.num_hidden_layers == 8
    again = train_standin(None, tmp_path / "b", seed=3, plan=plan)
    assert again["loss"] == description["loss"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_measure_agrees_with_the_model_alone(tokenizer: Any, model: Any) -> None:
    texts = [render(tokenizer, conversation) for conversation in generate_tool_use(3, 5, held_out=True)]
    rows = rows_of(tokenizer, texts, 256)[:5]
    measured = measure(STANDIN_FOLDER, {"generated": rows}, NgramTables(rows, len(tokenizer)))
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(pad_rows([row], 0)[0], use_cache=False).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="none").tolist()
    assert measured["loss"]["all"]["tokens"] == len(losses)
    assert measured["loss"]["all"]["model"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert measured["loss"]["generated"] == measured["loss"]["all"]


# --- bad data folders ---------------------------------------------------------------------------------------------


def test_data_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no MANIFEST\.json"):
        train_standin(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"licence": "CC BY 4.0"}, "only Apache-2.0 and MIT"), ({"sha256": "0"}, "differs from its manifest entry")],
)
def test_data_under_another_licence_or_changed_is_refused(tmp_path: Path, change: dict[str, str], said: str) -> None:
    (tmp_path / FILES[0]).write_bytes(b"x")
    entry = {"file": FILES[0], "repo": "a/b", "commit": "c", "licence": "MIT", "sha256": "1"}
    (tmp_path / "MANIFEST.json").write_text(json.dumps([entry | change]))
    with pytest.raises(CorpusError, match=said):
        data_entries(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "MANIFEST.json").write_text("[]")
    with pytest.raises(CorpusError, match=FILES[0]):
        data_entries(tmp_path)


def test_real_data_folder_matches_its_manifest(shared_data: Path) -> None:
    assert len(data_entries(shared_data / "train")) == len(FILES)
