"""Steering experiments: every scenario under every trait, strength and position, beside the controls that an effect
must beat, in one JSONL that a killed run goes on with.

    from qwenscope.analysis.experiments import experiment

    experiment("runs/demo", Path("scenarios.yaml"), Path("experiment"))

Legend: T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenscope.analysis.contrast import OnProgress, chosen_saes
from qwenscope.analysis.doses import dose_response, summarise
from qwenscope.analysis.heads import head
from qwenscope.analysis.scenarios import Plan, Scenario, read_plan, tool_calls
from qwenscope.errors import FormatError, ModelError
from qwenscope.features.continuation import generate
from qwenscope.features.steering import Steering, steer
from qwenscope.files import disk_errors_named, make_folder, write_json, write_text
from qwenscope.lm.forward import final_hidden, logits
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target, as_target
from qwenscope.seeds import derive_seed, generator
from qwenscope.training.lock import sole_writer

MOST_ANSWERS = 8
"""Of one run, however many tools are called."""
RUNS, RESULT, PLOT = "runs.jsonl", "experiment.json", "dose-response.svg"
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One scenario under one condition."""

    scenario: str
    repeat: int
    arm: str
    """unsteered, prompt, steered or random direction."""
    trait: str | None = None
    strength: float | None = None
    position: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and after which tokens."""

    prompt_ids: list[int]
    plain_ids: list[int]
    """The same conversation without the trait's words in the system message."""
    text: str


def runs_of(plan: Plan) -> list[Run]:
    """All runs, in order: scenario by scenario, the unsteered one first."""
    runs = []
    for scenario in plan.scenarios:
        for repeat in range(plan.repeats):
            runs.append(Run(scenario.name, repeat, "unsteered"))
            for name, trait in plan.traits.items():
                if trait.prompt is not None:
                    runs.append(Run(scenario.name, repeat, "prompt", name))
                runs += [
                    Run(scenario.name, repeat, arm, name, strength, position)
                    for arm in ("steered", "random direction")
                    for position in plan.positions
                    for strength in plan.strengths
                ]
    return runs


def experiment(
    target: str | Path | Target,
    scenarios: Path,
    out: Path,
    *,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Do all runs of a scenario file that are not done yet, and write what they show.

    Args:
        target: what `open_target` takes, or what it gave.
        scenarios: the file.
        out: folder of runs.jsonl, experiment.json and dose-response.svg; one with runs of this file goes on.
        on_progress: called with (phase, done, total).

    Returns:
        docs/analysis.md says what the keys mean.

    Raises:
        FormatError: a wrong key in the file, an SAE or latent that is not there, an `out` of other experiments.
        ModelError: the model has no chat template.
        LockError: another process does runs in `out`.
    """
    plan = read_plan(scenarios)
    with sole_writer(out):
        opened = as_target(target)
        ids = chosen_saes(opened, sorted({trait.sae for trait in plan.traits.values()}))
        for name, trait in plan.traits.items():
            if trait.latent >= opened.saes[trait.sae].dict_size:
                raise FormatError(f"{scenarios}: traits.{name}: {trait.sae} has no latent {trait.latent}")
        lm = opened.language_model()
        if not getattr(lm.tokenizer, "chat_template", None):
            raise ModelError(f"{lm.name} has no chat template; scenarios are conversations")
        planned = {
            "plan": plan.model_dump(mode="json"),
            "model": lm.digest(),
            "saes": {id: opened.saes[id].digest() for id in ids},
        }
        make_folder(out)
        done = _done(out / RUNS, planned)
        runs = runs_of(plan)
        by_name = {scenario.name: scenario for scenario in plan.scenarios}
        for number, run in enumerate(runs):
            on_progress("running scenarios", number, len(runs))
            if run not in done:
                record = asdict(run) | carry_out(opened, lm, plan, by_name[run.scenario], run)
                _append(out / RUNS, record)
                done[run] = record
        on_progress("running scenarios", len(runs), len(runs))
        result = head("scenarios", opened, ids) | {"model": opened.recipe.lm.model, "runs": len(runs)}
        result |= summarise(plan, [done[run] for run in runs])
        write_json(out / RESULT, result)
        write_text(out / PLOT, dose_response(plan, result))
    return result


def carry_out(target: Target, lm: LanguageModel, plan: Plan, scenario: Scenario, run: Run) -> dict[str, Any]:
    """What a run's record holds beside its condition."""
    pushes = _pushes(target, plan, run)
    words = plan.traits[run.trait].prompt if run.trait is not None and run.arm == "prompt" else None
    answers = list(converse(lm, plan, scenario, pushes, derive_seed(plan.seed, scenario.name, run.repeat), words))
    sums = torch.zeros(2, dtype=torch.float64)
    tokens = 0
    for answer in answers:
        ids = list(lm.tokenizer(answer.text, add_special_tokens=False).input_ids)
        if ids:
            tokens += len(ids)
            plain_TV = next_tokens(lm, answer.plain_ids, ids, [])
            own_TV = next_tokens(lm, answer.prompt_ids, ids, [_whole(push, len(answer.prompt_ids)) for push in pushes])
            sums[0] += (own_TV.exp() * (own_TV - plain_TV)).nan_to_num(0.0).sum()
            sums[1] -= plain_TV.gather(1, torch.tensor(ids)[:, None]).sum()
    texts = [answer.text for answer in answers]
    return {
        "answers": texts,
        "checks": {name: check.holds(texts) for name, check in plan.checks.items()},
        "tokens": tokens,
        "kl": float(sums[0]) / max(tokens, 1),
        "nats": float(sums[1]) / max(tokens, 1),
    }


def converse(
    lm: LanguageModel, plan: Plan, scenario: Scenario, pushes: Sequence[Steering], seed: int, words: str | None
) -> Iterator[Answer]:
    """The answers of one run: a tool that is called answers as the scenario says, then the user goes on.

    `words` are put before what the system message says.
    """
    messages = [dict(message) for message in scenario.messages]
    left = {name: list(results) for name, results in scenario.results.items()}
    turns = list(scenario.turns)
    for number in range(MOST_ANSWERS):
        prompt_ids, plain_ids = _rendered(lm, _told(messages, words), scenario), _rendered(lm, messages, scenario)
        pieces = generate(
            lm, prompt_ids, pushes, plan.max_new_tokens, plan.temperature, derive_seed(seed, "answer", number)
        )
        answer = Answer(prompt_ids, plain_ids, "".join(pieces))
        yield answer
        messages.append({"role": "assistant", "content": answer.text})
        if called := tool_calls(answer.text):
            messages += [{"role": "tool", "content": _result(left, name)} for name in called]
        elif turns:
            messages.append({"role": "user", "content": turns.pop(0)})
        else:
            return


@torch.no_grad()
def next_tokens(lm: LanguageModel, prompt_ids: Sequence[int], ids: Sequence[int], pushes: Sequence[Steering]) -> Tensor:
    """Log-probabilities, float64 [T, V], from which each of `ids` after the prompt would be drawn."""
    whole = torch.tensor([[*prompt_ids, *ids]], device=lm.device)
    with steer(lm, *pushes):
        hidden_TD = final_hidden(lm, whole)[0, len(prompt_ids) - 1 : -1]
    spread_TV: Tensor = logits(lm, hidden_TD).double().log_softmax(-1).cpu()
    return spread_TV


def _pushes(target: Target, plan: Plan, run: Run) -> list[Steering]:
    if run.strength is None or run.trait is None:
        return []
    trait = plan.traits[run.trait]
    where: Any = run.position
    push = Steering(
        site=target.targets[trait.sae],
        strength=run.strength,
        sae=target.saes[trait.sae],
        latent=trait.latent,
        mode=trait.mode,
        where=where,
    )
    if run.arm == "steered":
        return [push]
    random = generator(plan.seed, "random direction", run.trait, run.repeat)
    return [replace(push, along=torch.randn(len(push.direction_D), generator=random, dtype=torch.float32))]


def _whole(push: Steering, prompt: int) -> Steering:
    """The same push in one pass over prompt and answer, whose phases have positions there."""
    places: dict[Any, Any] = {"prefill": slice(0, prompt), "decode": slice(prompt, None)}
    return replace(push, where=places[push.where]) if push.where in ("prefill", "decode") else push


def _told(messages: Messages, words: str | None) -> Messages:
    if words is None:
        return messages
    if messages[0].get("role") == "system":
        return [{**messages[0], "content": f"{words}\n\n{messages[0].get('content')}"}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def _rendered(lm: LanguageModel, messages: Messages, scenario: Scenario) -> list[int]:
    try:
        ids = lm.tokenizer.apply_chat_template(
            messages,
            tools=scenario.tools,  # type: ignore[arg-type]
            add_generation_prompt=True,
            return_dict=False,
        )
    except Exception as error:  # a template raises what it likes
        raise FormatError(f"scenario {scenario.name}: the chat template refuses its messages ({error})") from None
    return list(ids)


def _result(left: Mapping[str, list[str]], name: str) -> str:
    """What a tool returns next."""
    if name not in left:
        return json.dumps({"error": f"there is no tool {name}"})
    return left[name].pop(0) if len(left[name]) > 1 else left[name][0]


def _done(path: Path, head: dict[str, Any]) -> dict[Run, dict[str, Any]]:
    """The runs of an earlier session, whose torn last line is cut off; a new file has the head alone.

    Raises:
        FormatError: the file is of another plan, model or SAE.
    """
    if not path.exists():
        write_text(path, json.dumps(head) + "\n")
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw:
        os.truncate(path, len(whole))
    try:
        first, *records = [json.loads(line) for line in whole.splitlines()]
        names = Run.__dataclass_fields__
        done = {Run(**{name: record[name] for name in names}): record for record in records}
    except (ValueError, KeyError, TypeError):
        raise FormatError(f"{path} is no file of runs; give another --out") from None
    if first != head:
        changed = next((key for key in head if first.get(key) != head[key]), "something")
        raise FormatError(f"{path} has runs of another {changed.removesuffix('s')}; give another --out")
    return done


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """One more line, which a kill leaves whole or torn, but never in doubt."""
    with disk_errors_named(path), path.open("ab") as file:
        file.write((json.dumps(record, allow_nan=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
