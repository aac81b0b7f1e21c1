"""`evaluate` on a run folder with a tiny model: the contract's keys, exact files, honest errors, and the report."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from evaluation_cases import conversation
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from qwenscope.checksums import verify_folder, write_checksums
from qwenscope.errors import CorpusError, FormatError, ModelError, QwenscopeError
from qwenscope.evaluation.report import report_html
from qwenscope.evaluation.run import evaluate
from qwenscope.lm.standin import STANDIN_FOLDER
from qwenscope.opening import fill_splits
from qwenscope.sae.sae import TopKSAE

CONTRACT = {
    "tokens", "mse", "fvu", "explained_variance", "explained_variance_per_dim", "cosine", "l0", "dead_fraction",
    "ce_clean", "ce_spliced", "ce_zero_ablation", "ce_mean_ablation", "ce_recovered_zero", "ce_recovered_mean", "kl",
    "mse_special_tokens",
}  # fmt: skip
HOOKS = {"sae_delta": (2, "deltanet"), "sae_attn": (3, "attention")}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random layers over the stand-in's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(
        STANDIN_FOLDER, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    config = Qwen3_5MoeTextConfig(
        vocab_size=4096,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        Qwen3_5MoeForCausalLM(config).save_pretrained(folder)
    return folder


def chat(n: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What is {n} plus {n}?"},
        {"role": "assistant", "content": f"It is {2 * n}."},
    ]


def write_data(path: Path, chats: int = 4, tools: int = 4) -> Path:
    rows: list[dict[str, Any]] = [{"messages": chat(n)} for n in range(chats)]
    for n in range(tools):
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": n, "b": n}}}
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"Add {n} and {n}."},
                    {"role": "assistant", "content": "", "tool_calls": [call]},
                    {"role": "tool", "name": "add", "content": str(2 * n)},
                    {"role": "assistant", "content": f"{2 * n}."},
                ]
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    points = {
        sae_id: {"layer": layer, "kind": kind, "dict_size": 32, "k": 4, "lr": 1e-3}
        for sae_id, (layer, kind) in HOOKS.items()
    }
    recipe = {
        "lm": {"model": str(model_folder), "dtype": "float32", "device": "cpu"},
        "hook_points": points,
        "corpus": {"max_length": 256, "batch_tokens": 512, "sources": [{"name": "tool_use", "weight": 1.0}]},
        "training": {"tokens": 10000, "batch_size": 64, "warmup_steps": 2},
        "evaluation": {"tokens": 300},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    (folder / "status.json").write_text('{"state": "complete"}', encoding="utf-8")
    for sae_id, (layer, _) in HOOKS.items():
        TopKSAE(16, 32, 4, seed=layer).save(folder / "saes" / sae_id)
    lines = [{"step": n, "tokens": 64 * n, "saes": {sae_id: {"fvu": 1 / n} for sae_id in HOOKS}} for n in range(1, 400)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def measured(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return evaluate(run_folder, data=write_data(tmp_path_factory.mktemp("data") / "chats.jsonl"), out=run_folder)


def no_constants(value: str) -> None:
    raise AssertionError(f"JSON has no {value}")


def test_the_files_hold_the_contract(measured: dict, run_folder: Path) -> None:
    text = (run_folder / "evaluation.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=no_constants) == measured
    assert set(measured["saes"]) == set(HOOKS)
    for splits in measured["saes"].values():
        assert set(splits) == {"chat", "tool_use"}
        for figures in splits.values():
            assert set(figures) >= CONTRACT
            assert all(math.isfinite(figures[key]) for key in CONTRACT)
            assert figures["explained_variance"] == 1 - figures["fvu"]
            assert figures["special_tokens"]["tokens"] > 0
            assert set(figures["nth_decoder_projection"]) == {"half", "quarter"}
            assert figures["nth_decoder_projection"]["half"] < figures["nth_decoder_projection"]["quarter"]
    assert set(measured["decoder_pairwise_cosine"]) == set(HOOKS)
    assert all(0 < cosine < 1 for cosine in measured["decoder_pairwise_cosine"].values())
    assert {"user", "assistant", "template"} <= set(measured["saes"]["sae_attn"]["chat"]["roles"])
    assert {"tool_call", "tool_result"} <= set(measured["saes"]["sae_attn"]["tool_use"]["roles"])
    assert measured["data"]["splits"]["chat"]["conversations"] == 4
    assert [path.name for path in run_folder.glob(".*tmp")] == []


def test_clean_loss_is_shared_and_dead_latents_are_counted_over_all_splits(measured: dict) -> None:
    for split in ("chat", "tool_use"):
        assert len({splits[split]["ce_clean"] for splits in measured["saes"].values()}) == 1
    for sae_id, splits in measured["saes"].items():
        total = measured["dead"][sae_id]
        assert total["tokens"] == sum(figures["tokens"] for figures in splits.values())
        assert total["dead_fraction"] <= min(figures["dead_fraction"] for figures in splits.values())


def test_the_comparison_stands_beside(measured: dict) -> None:
    comparison = measured["comparison"]
    assert [(pair["kind"], pair["layers"]) for pair in comparison["pairs"]] == [("matched", [2, 3])]
    for split, found in comparison["splits"].items():
        cell = found["differences"]["sae_delta -> sae_attn"]["fvu"]
        assert cell["first"] == pytest.approx(measured["saes"]["sae_delta"][split]["fvu"])
        low, high = cell["interval"]
        assert low <= cell["difference"] <= high
    assert comparison["routing"]["chat"]["sae_delta"]["layers"] == [3]


def test_usefulness_is_measured_on_demand(run_folder: Path, tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "many.jsonl", 60, 60), tmp_path / "out"
    with pytest.raises(
        CorpusError, match="no label has 20 tokens on either side in 2 conversations, so that usefulness"
    ):
        evaluate(run_folder, data=write_data(tmp_path / "few.jsonl", 1, 1), out=out, probing=True)
    assert not out.exists()
    found = evaluate(run_folder, data=data, tokens=1500, out=out, probing=True)["usefulness"]
    assert set(found["saes"]) == set(HOOKS)
    assert found["labels"].keys() >= {"role", "next token", "split"}
    for figures in found["saes"].values():
        assert set(figures["probing"]) == {"latents", "frozen decoder", "random directions", "rows"}
        assert all(0 <= cell["auroc"] <= 1 for of in figures["probing"].values() for cell in of.values())
        assert all(cell["interval"] for of in figures["probing"].values() for cell in of.values())
        assert 0 <= figures["absorption"]["latents"]["absorbed"]["share"] <= 1
        assert figures["mean_over_std"] > 0
    assert "What a few latents know" in (out / "report.html").read_text(encoding="utf-8")
    assert json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["usefulness"] == found


def test_labels_that_rows_state_are_probed_for(run_folder: Path, tmp_path: Path) -> None:
    data, tasks, out = write_data(tmp_path / "data.jsonl"), tmp_path / "moods.jsonl", tmp_path / "out"
    rows = [
        {"messages": chat(number), "labels": {"mood": "calm" if number % 2 else "<b>angry", "seen": number % 3}}
        for number in range(40)
    ]
    rows.append({"messages": chat(99)})  # states nothing: its tokens belong to no side
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = evaluate(run_folder, data=data, tokens=60, out=out, tasks=tasks)
    assert "usefulness" not in result
    found = result["tasks"]
    assert (found["origin"], found["conversations"], found["labels"]) == ("moods.jsonl", 41, {"mood": 1, "seen": 3})
    assert set(found["saes"]) == set(HOOKS)
    assert "What a few latents know of moods.jsonl" in (out / "report.html").read_text(encoding="utf-8")
    for labels, said in ((None, "no row has labels"), (["calm"], "moods.jsonl:1: labels must be")):
        tasks.write_text(json.dumps({"messages": chat(1), "labels": labels}) + "\n", encoding="utf-8")
        with pytest.raises(CorpusError, match=said):
            evaluate(run_folder, data=data, tokens=60, out=tmp_path / "none", tasks=tasks)
    assert not (tmp_path / "none").exists()


def test_tokens_limit_each_split_exactly(run_folder: Path, tmp_path: Path) -> None:
    target = shutil.copytree(run_folder, tmp_path / "run")
    result = evaluate(target, data=write_data(tmp_path / "d.jsonl"), tokens=37)
    assert {split: data["tokens"] for split, data in result["data"]["splits"].items()} == {"chat": 37, "tool_use": 37}


def test_a_split_without_conversations_is_absent(run_folder: Path, tmp_path: Path) -> None:
    target = shutil.copytree(run_folder, tmp_path / "run")
    result = evaluate(target, data=write_data(tmp_path / "d.jsonl", tools=0))
    assert list(result["saes"]["sae_attn"]) == ["chat"]
    assert "tool use" not in (target / "report-d.html").read_text(encoding="utf-8").lower()


def test_other_data_leave_the_held_out_evaluation_alone(run_folder: Path, tmp_path: Path) -> None:
    target = shutil.copytree(run_folder, tmp_path / "run")
    evaluate(target, tokens=60)
    held_out = {name: (target / name).read_bytes() for name in ("evaluation.json", "report.html")}
    result = evaluate(target, data=write_data(tmp_path / "my chats.jsonl"), tokens=60)
    assert json.loads((target / "evaluation-my chats.json").read_text(encoding="utf-8")) == result
    assert {name: (target / name).read_bytes() for name in held_out} == held_out


def test_held_out_conversations_of_the_recipe(run_folder: Path, tmp_path: Path) -> None:
    target = shutil.copytree(run_folder, tmp_path / "run")
    result = evaluate(target, tokens=200)
    assert list(result["saes"]["sae_attn"]) == ["tool_use"]
    assert result["data"]["splits"]["tool_use"]["tokens"] == 200
    assert evaluate(target, tokens=200) == result, "the same numbers again"


def test_a_release_folder_is_measured_alike(run_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "release"
    shutil.copytree(run_folder / "saes", target)
    shutil.copy(run_folder / "recipe.yaml", target)
    data = write_data(tmp_path / "d.jsonl")
    run = shutil.copytree(run_folder, tmp_path / "run")
    assert evaluate(target, data=data, tokens=60)["saes"] == evaluate(run, data=data, tokens=60)["saes"]


def test_a_release_is_verified_before_and_listed_anew_after(run_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "release"
    shutil.copytree(run_folder / "saes", target)
    shutil.copy(run_folder / "recipe.yaml", target)
    write_checksums(target)
    evaluate(target, data=write_data(tmp_path / "d.jsonl"), tokens=60)
    verify_folder(target)
    assert "evaluation-d.json" in (target / "SHA256SUMS").read_text(encoding="utf-8")
    with (target / "recipe.yaml").open("a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(FormatError, match=r"recipe\.yaml is damaged"):
        evaluate(target, data=tmp_path / "d.jsonl", tokens=60)


def no_page(*_: object) -> str:
    raise RuntimeError("cannot draw")


def test_a_page_that_cannot_be_drawn_loses_no_measurement(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "release"
    shutil.copytree(run_folder / "saes", target)
    shutil.copy(run_folder / "recipe.yaml", target)
    write_checksums(target)
    data = write_data(tmp_path / "d.jsonl")
    evaluate(target, data=data, tokens=60)
    older = json.loads((target / "evaluation-d.json").read_text(encoding="utf-8"))
    with monkeypatch.context() as patch:
        patch.setattr("qwenscope.evaluation.run.report_html", no_page)
        with pytest.raises(RuntimeError, match="cannot draw"):
            evaluate(target, data=data, tokens=90)
    newer = json.loads((target / "evaluation-d.json").read_text(encoding="utf-8"))
    assert newer["data"] != older["data"]
    assert not (target / "report-d.html").exists(), "the old page would stand beside new numbers"
    verify_folder(target)  # and the release is whole, so that it can be measured again
    assert evaluate(target, data=data, tokens=90) == newer
    assert (target / "report-d.html").exists()
    verify_folder(target)


def test_a_line_of_metrics_that_was_cut_off_costs_one_point(run_folder: Path, tmp_path: Path, measured: dict) -> None:
    target = shutil.copytree(run_folder, tmp_path / "run")
    whole = report_html(measured, target)
    with (target / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 400, "tok')
    assert report_html(measured, target) == whole


def test_figures_that_are_not_finite_are_named_and_the_rest_is_kept(
    run_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][7] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    target = shutil.copytree(run_folder, tmp_path / "run")
    recipe = yaml.safe_load((target / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["lm"]["model"] = str(model)
    (target / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(ModelError, match=r"are not finite.*saes/sae_attn/chat/ce_clean.* and \d+ more are null"):
        evaluate(target, data=write_data(tmp_path / "d.jsonl"), tokens=60)
    written = json.loads((target / "evaluation-d.json").read_text(encoding="utf-8"), parse_constant=no_constants)
    cell = written["saes"]["sae_delta"]["chat"]
    assert cell["ce_clean"] is None
    assert cell["kl"] is None
    assert cell["fvu"] > 0
    assert "FVU" in (target / "report-d.html").read_text(encoding="utf-8")


def broken(run_folder: Path, tmp_path: Path, breakage: str) -> Path:
    target = shutil.copytree(run_folder, tmp_path / "run")
    for name in ("evaluation.json", "report.html"):
        (target / name).unlink(missing_ok=True)
    if breakage == "no recipe":
        (target / "recipe.yaml").unlink()
    elif breakage == "not complete":
        shutil.rmtree(target / "saes")
    elif breakage == "sae missing":
        shutil.rmtree(target / "saes" / "sae_attn")
    elif breakage == "other size":
        TopKSAE(16, 64, 4, seed=0).save(target / "saes" / "sae_attn")
    elif breakage == "other width":
        for sae_id in HOOKS:
            TopKSAE(8, 32, 4, seed=0).save(target / "saes" / sae_id)
    return target


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        ("no recipe", "recipe.yaml"),
        ("not complete", "not complete"),
        ("sae missing", "sae_attn"),
        ("other size", "dict_size 64"),
        ("other width", "hidden_dim 8"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(run_folder, tmp_path, breakage, message) -> None:
    target = broken(run_folder, tmp_path, breakage)
    with pytest.raises(FormatError, match=message):
        evaluate(target, data=write_data(tmp_path / "d.jsonl"))
    assert not (target / "evaluation.json").exists()
    assert not (target / "report.html").exists()


def test_no_folder_and_no_data_are_errors(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nowhere"):
        evaluate(tmp_path / "nowhere")
    target = broken(run_folder, tmp_path, "nothing")
    with pytest.raises(QwenscopeError, match=r"missing\.jsonl"):
        evaluate(target, data=tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(CorpusError, match="no rows"):
        evaluate(target, data=tmp_path / "empty.jsonl")
    assert not (target / "evaluation.json").exists()


def test_splits_fill_to_the_token_and_rare_ones_are_given_up() -> None:
    stream = [conversation(10, seed, "chat" if seed % 5 else "tool_use") for seed in range(1, 100)]
    splits = fill_splits(stream, 25)
    assert [len(c.token_ids) for c in splits["chat"]] == [10, 10, 5]
    assert [len(c.token_ids) for c in splits["tool_use"]] == [10, 10, 5]
    assert len(splits["chat"][-1].roles) == 5
    assert splits["chat"][-1].truncated
    only_chat = (conversation(10, seed) for seed in range(10**9))
    assert list(fill_splits(only_chat, 25, limit=250)) == ["chat"]
    assert fill_splits([], 25) == {}


class Page(HTMLParser):
    """Tags that open and close, attributes that would load something, and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.loads, self.words, self.tables = [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tables += tag == "table"
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag != "meta":  # the only void element of the page
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_is_one_whole_page_that_loads_nothing(measured: dict, run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "url(" not in text
    assert page.tables == 8, "fidelity, effect and roles per split, the overlap of neighbours, and L0 proxies"
    words = " ".join(page.words)
    for splits in measured["saes"].values():
        for figures in splits.values():
            assert format(figures["fvu"], ".4f") in words
            assert format(figures["ce_recovered_mean"], ".4f") in words
    assert text.count("<figure>") == 6 + 8 + 2 + 2 + 1, "depth, differences, densities, routing, training"
    assert "nan" not in re.findall(r"[a-z]+", re.sub(r"<(script|style).*?</\1>", "", text, flags=re.S))


def test_names_are_escaped(measured: dict, run_folder: Path) -> None:
    hostile = copy.deepcopy(measured)
    hostile["language_model"]["name"] = "<script>alert(1)</script>"
    hostile["data"]["origin"] = '"><img src=x>'
    text = report_html(hostile, run_folder)
    assert "<script>alert" not in text
    assert "<img" not in text


def test_the_report_needs_no_training_metrics_and_no_kinds(measured: dict, tmp_path: Path) -> None:
    plain = copy.deepcopy(measured)
    plain["comparison"] |= {"pairs": [], "routing": {}, "recurrent_state": {}}
    for found in plain["comparison"]["splits"].values():
        found["differences"] = {}
        found["intervals"] = {sae_id: dict.fromkeys(cells) for sae_id, cells in found["intervals"].items()}
    for point in plain["hook_points"].values():
        point["kind"] = None
    page = Page(report_html(plain, tmp_path))
    assert page.open == []
    assert "DeltaNet" not in " ".join(page.words)
