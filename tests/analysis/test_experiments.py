"""Steering experiments: a planted direction shows, its controls do not, a killed session goes on, seeds decide all."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_run import make_language_model, tiny_recipe
from typer.testing import CliRunner

from qwenscope.analysis import experiments
from qwenscope.analysis.experiments import RUNS, converse, experiment, runs_of
from qwenscope.analysis.result_forms import FORMS
from qwenscope.analysis.scenarios import Check, Scenario, read_plan
from qwenscope.cli.main import app
from qwenscope.errors import FormatError, QwenscopeError
from qwenscope.files import write_text
from qwenscope.lm.forward import unembedding
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.recipe import HookPoint, load_recipe
from qwenscope.sae.sae import TopKSAE

LATENT = 3
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
PLAN: dict[str, Any] = {
    "seed": 1,
    "max_new_tokens": 4,
    "temperature": 1.0,
    "repeats": 2,
    "strengths": [0.01, 8],
    "positions": ["all", "prefill", "decode"],
    "traits": {
        "asks": {"sae": "late", "latent": LATENT, "prompt": "Ask.", "check": "asks"},
        "other": {"sae": "late", "latent": LATENT + 1, "check": "short"},
    },
    "checks": {"asks": {"asks": True}, "calls": {"calls": "search"}, "short": {"words": [0, 2]}},
    "scenarios": [
        {"name": "plain", "messages": [{"role": "user", "content": "order"}], "turns": ["status"]},
        {"name": "tools", "messages": [{"role": "user", "content": "query"}], "tools": [TOOL]},
    ],
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SAE at a tiny model's last layer, one latent of which writes question marks; of a model that is surer
    of its words than random ones are.
    """
    model = make_language_model(tmp_path_factory.mktemp("model") / "lm")
    weights = load_file(model / "model.safetensors")
    (name,) = [name for name in weights if "embed_tokens" in name]
    weights[name] *= 4
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    recipe = tiny_recipe(model)
    lm = load_language_model(recipe.lm, lm_head=True)
    sae = TopKSAE(lm.hidden_dim, 64, 4, seed=1)
    with torch.no_grad():
        sae.decoder.weight[:, LATENT] = torch.nn.functional.normalize(unembedding(lm)[mark(lm)], dim=0)
    folder = tmp_path_factory.mktemp("late")
    sae.save(folder / "late")
    point = HookPoint.model_validate({"site": "layers.3", "dict_size": 64, "k": 4, "lr": 1e-3})
    write_text(folder / "recipe.yaml", recipe.model_copy(update={"hook_points": {"late": point}}).to_yaml())
    return folder


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "scenarios.yaml"
    write_text(path, yaml.safe_dump(PLAN, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(suite: Path, plan_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done") / "out"
    arguments = ["steer", suite, "--scenarios", plan_file, "--out", out]
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    for shown in ("unsteered", "prompt", "random direction", "What each trait changes, at strength 8, all"):
        assert shown in result.stdout
    return out


@pytest.fixture(scope="module")
def lm(suite: Path) -> LanguageModel:
    return load_language_model(load_recipe(suite / "recipe.yaml").lm, lm_head=True)


def mark(lm: LanguageModel) -> int:
    return int(lm.tokenizer("?", add_special_tokens=False).input_ids[0])


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RUNS).read_text().splitlines()[1:]]


def test_a_planted_direction_shows_and_its_controls_do_not(done: Path) -> None:
    result = json.loads((done / "experiment.json").read_text())
    FORMS[result["kind"]].validate_json((done / "experiment.json").read_bytes(), strict=True)
    assert result["runs"] == 2 * 2 * (1 + 1 + 2 * 2 * 3 * 2) == len(records(done))
    cells = {(c["arm"], c["trait"], c["strength"], c["position"]): c for c in result["effects"]}
    steered = cells["steered", "asks", 8, "all"]
    plain = result["unsteered"]["checks"]["asks"]
    assert steered["checks"]["asks"]["rate"] == 1
    assert steered["checks"]["asks"]["difference"] == 1 - plain > 0.5
    assert steered["checks"]["asks"]["beyond_random_difference"] > 0.5
    assert steered["kl"] > 10 * cells["steered", "asks", 0.01, "all"]["kl"] > 0
    assert steered["perplexity"] > result["unsteered"]["perplexity"]
    assert {arm for arm, trait, *_ in cells if trait == "asks"} == {"prompt", "steered", "random direction"}
    assert result["matrix"]["traits"]["asks"]["asks"] == 1 - plain
    assert "random directions" in (done / "dose-response.svg").read_text()


def test_the_scenario_files_that_are_shown_are_scenario_files(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    shown = re.findall(r"^```yaml\n(.*?)^```", (root / "docs/analysis.md").read_text(), re.DOTALL | re.MULTILINE)
    (plan,) = (block for block in shown if "traits:" in block)
    write_text(tmp_path / "shown.yaml", plan)
    for path in (tmp_path / "shown.yaml", root / "examples/scenarios.yaml"):
        assert read_plan(path).traits


def test_each_repeat_has_a_random_direction_of_its_own(done: Path) -> None:
    wanted = {"scenario": "plain", "arm": "random direction", "trait": "asks", "strength": 8, "position": "all"}
    found = [tuple(r["answers"]) for r in records(done) if wanted.items() <= r.items()]
    assert len(set(found)) == len(found) == 2


def test_positions_are_what_they_say(done: Path) -> None:
    at = {
        position: [
            r["answers"][0]
            for r in records(done)
            if (r["arm"], r["trait"], r["strength"]) == ("steered", "asks", 8) and r["position"] == position
        ]
        for position in ("all", "prefill", "decode")
    }
    assert all(answer == "????" for answer in at["all"])
    assert all(answer.startswith("?") for answer in at["prefill"])
    assert any(answer != "????" for answer in at["prefill"])
    assert all(answer.endswith("???") and answer != "????" for answer in at["decode"])


def test_kl_and_nats_are_those_of_a_hook_written_by_hand(done: Path, lm: LanguageModel) -> None:
    wanted = [r for r in records(done) if r["scenario"] == "tools" and r["strength"] == 8 and r["arm"] == "steered"]
    for record in [r for r in wanted if r["trait"] == "asks"]:
        (answer,) = record["answers"]
        messages = PLAN["scenarios"][1]["messages"]
        prompt = lm.tokenizer.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True, return_dict=False)
        ids = lm.tokenizer(answer, add_special_tokens=False).input_ids
        whole = torch.tensor([[*prompt, *ids]])
        start, stop = {"all": (0, None), "prefill": (0, len(prompt)), "decode": (len(prompt), None)}[record["position"]]
        direction_D = torch.nn.functional.normalize(unembedding(lm)[mark(lm)], dim=0)

        def push(
            _module: Any, _inputs: Any, x_CTD: Any, start: int = start, stop: Any = stop, d: Any = direction_D
        ) -> Any:
            x_CTD = x_CTD.clone()
            x_CTD[:, start:stop] += 8 * x_CTD[:, start:stop].norm(dim=-1, keepdim=True) * d
            return x_CTD

        plain_TV = lm.model(whole).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        handle = lm.layers[3].register_forward_hook(push)
        own_TV = lm.model(whole).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        handle.remove()
        assert record["kl"] == pytest.approx(float((own_TV.exp() * (own_TV - plain_TV)).sum(1).mean()), rel=1e-4)
        assert record["nats"] == pytest.approx(-float(plain_TV.gather(1, torch.tensor(ids)[:, None]).mean()), rel=1e-4)


@pytest.mark.slow
def test_a_killed_session_goes_on_without_repeating(
    done: Path, suite: Path, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL comes in the middle of the seventh line; afterwards the bytes are those of a session without it."""
    out = tmp_path / "out"
    script = f"""
import json, os, signal, sys
from pathlib import Path
from qwenscope.analysis import experiments
whole, count = experiments._append, []
def torn(path, record):
    count.append(record)
    if len(count) == 7:
        with path.open("ab") as file:
            file.write(json.dumps(record)[:50].encode())
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, record)
experiments._append = torn
experiments.experiment(Path({str(suite)!r}), Path({str(plan_file)!r}), Path({str(out)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert not (out / RUNS).read_bytes().endswith(b"\n")
    again: list[Any] = []
    carry_out = experiments.carry_out
    monkeypatch.setattr(experiments, "carry_out", lambda *given: (again.append(given[-1]), carry_out(*given))[1])
    experiment(suite, plan_file, out)
    assert again == runs_of(read_plan(plan_file))[6:]
    for name in (RUNS, "experiment.json", "dose-response.svg"):
        assert (out / name).read_bytes() == (done / name).read_bytes()
    experiment(suite, plan_file, out)
    assert len(again) == len(records(out)) - 6  # nothing was left to do


def test_tools_answer_as_the_file_says(lm: LanguageModel, plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = '<tool_call>\n{"name": "search", "arguments": {"query": "order"}}\n</tool_call>'
    said = iter(
        [
            call,
            "<tool_call>\n<function=search>\n</function>\n</tool_call>",
            call,
            "One?",
            "<tool_call>\n<function=other>",
            "Two",
        ]
    )

    def scripted(_lm: Any, _ids: Any, _pushes: Any, *_: Any) -> Iterator[str]:
        yield next(said)

    monkeypatch.setattr(experiments, "generate", scripted)
    scenario = Scenario.model_validate(
        PLAN["scenarios"][0] | {"tools": [TOOL], "results": {"search": ["first found", "second found"]}}
    )
    answers = list(converse(lm, read_plan(plan_file), scenario, [], 0, "Be brief."))
    last = lm.tokenizer.decode(answers[-1].prompt_ids)
    places = [
        last.index(text)
        for text in ("Be brief.", "order", "first found", "second found", "One?", "status", "no tool other")
    ]
    assert places == sorted(places)
    assert last.count("second found") == 2  # the last result stays
    assert "Be brief." not in lm.tokenizer.decode(answers[-1].plain_ids)
    texts = [answer.text for answer in answers]
    assert texts[3] == "One?"
    holds = {
        "search": Check(calls="search"),
        "none": Check(calls="book"),
        "asks": Check(asks=True),
        "regex": Check(matches="^Two$"),
        "few": Check(words=(2, 2)),
        "many": Check(words=(3, 9)),
    }
    found = {name: check.holds(texts) for name, check in holds.items()}
    assert found == {"search": True, "none": False, "asks": True, "regex": True, "few": True, "many": False}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("traits", {"asks": {"sae": "late", "latent": 99, "check": "asks"}}, "late has no latent 99"),
        ("traits", {"asks": {"sae": "early", "latent": 1, "check": "asks"}}, "--sae early is not in"),
        ("traits", {"asks": {"sae": "late", "latent": 1, "check": "aks"}}, "there is no check aks"),
        ("checks", {"asks": {"asks": True, "calls": "x"}}, "one of calls, asks"),
        ("checks", {"asks": {"matches": "("}}, "no regular expression"),
        ("temperature", 0, "at temperature 0 all repeats are alike"),
        ("strengths", [0, 1], "none is 0"),
        ("positions", ["answer"], "positions.0"),
        ("temprature", 1, "unknown key temprature; did you mean temperature?"),
        ("scenarios", [{"name": "a", "messages": []}], "scenarios.0.messages"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(suite: Path, tmp_path: Path, key: str, value: Any, said: str) -> None:
    write_text(tmp_path / "plan.yaml", yaml.safe_dump(PLAN | {key: value}))
    with pytest.raises(QwenscopeError) as error:
        experiment(suite, tmp_path / "plan.yaml", tmp_path / "out")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_runs_of_another_plan_are_refused(done: Path, suite: Path, plan_file: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    write_text(tmp_path / "plan.yaml", yaml.safe_dump(PLAN | {"seed": 2}))
    with pytest.raises(FormatError, match="has runs of another plan; give another --out"):
        experiment(suite, tmp_path / "plan.yaml", out)
    (out / RUNS).write_text("nothing\n")
    with pytest.raises(FormatError, match="is no file of runs"):
        experiment(suite, plan_file, out)


def test_steer_takes_a_prompt_or_scenarios(suite: Path, plan_file: Path, tmp_path: Path) -> None:
    for given in ([], ["--scenarios", plan_file], ["--scenarios", plan_file, "--out", tmp_path, "Hello"]):
        result = CliRunner().invoke(app, ["steer", str(suite), *map(str, given)])
        assert "give a PROMPT and what to steer along, or --scenarios" in str(result.exception)
