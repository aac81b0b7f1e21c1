"""The kinds of exchange a tool-use conversation is made of: each adds one to a dialogue and returns its subject."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random

from qwenscope.corpus.tool_use.dialogue import Case, Dialogue
from qwenscope.corpus.tool_use.schema import Task, content

_MIRROR = {"me": "you", "my": "your", "I": "you", "us": "you", "mine": "yours"}
_FIRST_PERSON = re.compile(r"\b(?:me|my|I|us|mine)\b")


def mirrored(clause: str) -> str:
    """A user's clause as the assistant repeats it: my becomes your, except inside quotes."""
    parts = clause.split('"')
    parts[::2] = [_FIRST_PERSON.sub(lambda match: _MIRROR[match[0]], part) for part in parts[::2]]
    return '"'.join(parts)


def mistyped(rng: Random, value: str) -> str:
    """`value` with two neighbouring letters or digits swapped, as a hurried person types it."""
    spots = [i for i in range(1, len(value) - 1) if value[i : i + 2].isalnum() and value[i] != value[i + 1]]
    if not spots:
        return value + value[-1]
    spot = rng.choice(spots)
    return value[:spot] + value[spot + 1] + value[spot] + value[spot + 2 :]


def single(d: Dialogue) -> str:
    """One request, one call, one answer."""
    task = d.choose("ordinary")
    case = d.sample(task)
    d.request(d.say(task.clauses, case.slots))
    d.call([case], d.lead(task.tool))
    d.assistant(d.say(task.answers, case.slots))
    return task.tool


def _several(d: Dialogue) -> list[tuple[Task, Case]]:
    count = 2 if d.rng.random() < 0.75 else 3
    tasks = [d.choose("ordinary")] * count if d.rng.random() < 0.45 else [d.choose("ordinary") for _ in range(count)]
    pairs = [(task, d.sample(task)) for task in tasks]
    d.request(d.say("joints").replace("_", " ").join(d.say(task.clauses, case.slots) for task, case in pairs))
    return pairs


def _report(d: Dialogue, pairs: list[tuple[Task, Case]]) -> None:
    answers = [d.say(task.answers, case.slots) for task, case in pairs]
    d.assistant("\n- ".join([d.say("together"), *answers]) if d.rng.random() < 0.4 else " ".join(answers))


def parallel(d: Dialogue) -> str:
    """Two or three independent calls in one turn, of one tool or of several."""
    pairs = _several(d)
    d.call([case for _, case in pairs], d.lead(pairs[0][0].tool))
    _report(d, pairs)
    return "+".join(task.tool for task, _ in pairs)


def partial(d: Dialogue) -> str:
    """Parallel calls of which one fails: only that one is repeated."""
    pairs = _several(d)
    broken = d.rng.randrange(len(pairs))
    task, case = pairs[broken]
    failed, error = d.failure(case)
    d.call([failed if i == broken else c for i, (_, c) in enumerate(pairs)], d.lead(pairs[0][0].tool))
    d.call([case], d.say("partly", tool=task.tool, error=error))
    _report(d, pairs)
    return "+".join(task.tool for task, _ in pairs)


def steps(d: Dialogue) -> str:
    """A chain of calls, each using the result of an earlier one."""
    while d.denied.intersection((chain := d.rng.choice(content().chains)).tools):
        pass
    slots = d.draw(chain.draws)
    stop = chain.stop if chain.stop and d.evaluate(chain.stop.when, slots) else None
    cases = [d.case(step, slots) for step in chain.steps[: stop.after if stop else None]]
    d.request(d.say(chain.clauses, slots))
    d.call(cases[:1], d.lead(cases[0].tool))
    for case in cases[1:]:
        d.call([case], d.say(chain.links, slots) if d.rng.random() < 0.6 else "")
    d.assistant(d.say(stop.answers if stop else chain.answers, slots))
    return f"{chain.name}-stopped" if stop else chain.name


def fault(d: Dialogue) -> str:
    """A tool that fails for a moment: the call is repeated, and either works or is given up honestly."""
    task = d.choose("ordinary")
    case = d.sample(task)
    d.request(d.say(task.clauses, case.slots))
    failed, error = d.failure(case)
    d.call([failed], d.lead(task.tool))
    retry = d.say("retries", tool=task.tool, error=error) if d.rng.random() < 0.7 else ""
    if d.rng.random() < 0.75:
        d.call([case], retry)
        d.assistant(d.say(task.answers, case.slots))
        return task.tool
    failed, error = d.failure(case)
    d.call([failed], retry)
    d.assistant(d.say("give_up", tool=task.tool, error=error))
    return f"{task.tool}-given-up"


def correction(d: Dialogue) -> str:
    """A mistyped value that the tool does not find; the user corrects it."""
    task = d.choose("lookup")
    assert task.gap is not None
    case, slot = d.sample(task), task.gap.slot
    right = case.arguments[slot]
    wrong = mistyped(d.rng, right)
    d.request(d.say(task.clauses, case.slots, **{slot: wrong}))
    error = json.dumps({"error": d.say("not_found", slot=slot, value=wrong)})
    d.call([Case(task.tool, {**case.arguments, slot: wrong}, error, {})], d.lead(task.tool))
    d.assistant(d.say("ask_again", value=wrong, label=slot.replace("_", " "), tool=task.tool))
    d.user(d.say("replies", value=right))
    d.call([case])
    d.assistant(d.say(task.answers, case.slots))
    return task.tool


def clarify(d: Dialogue) -> str:
    """A request that lacks something: the assistant asks, in words or through ask_user, and then acts."""
    task = d.choose("gap")
    assert task.gap is not None
    case = d.sample(task)
    d.request(d.say(task.gap.vague, case.slots))
    question, reply = d.say(task.gap.question, case.slots), d.say("replies", value=case.slots[task.gap.slot])
    if d.rng.random() < 0.35:
        d.call([Case("ask_user", {"question": question}, reply, {})])
    else:
        d.assistant(question)
        d.user(reply)
    d.call([case], d.lead(task.tool))
    d.assistant(d.say(task.answers, case.slots))
    return task.tool


def follow_up(d: Dialogue) -> str:
    """A request, then the same again for another value in half a sentence."""
    while True:
        task = d.choose("lookup")
        assert task.gap is not None
        first, second = d.sample(task), d.sample(task)
        if set(second.arguments) == {task.gap.slot} and first.arguments != second.arguments:
            break
    d.request(d.say(task.clauses, first.slots))
    d.call([first], d.lead(task.tool))
    d.assistant(d.say(task.answers, first.slots))
    d.user(d.say("again", value=second.arguments[task.gap.slot]))
    d.call([second])
    d.assistant(d.say(task.answers, second.slots))
    return task.tool


def confirm(d: Dialogue) -> str:
    """Something that cannot be undone: the assistant asks first, and a no is respected."""
    task = d.choose("careful")
    case = d.sample(task)
    clause = d.say(task.clauses, case.slots)
    d.request(clause)
    d.assistant(d.say("confirm", clause=mirrored(clause)))
    d.offered[task.tool] = None
    if d.rng.random() < 0.3:
        d.user(d.say("no"))
        d.assistant(d.say("left"))
        return f"{task.tool}-withdrawn"
    d.user(d.say("yes"))
    d.call([case])
    d.assistant(d.say(task.answers, case.slots))
    return task.tool


def no_tool(d: Dialogue) -> str:
    """A request for which no tool is offered: the assistant says so and calls nothing."""
    while (task := d.choose("ordinary")).tool in d.offered:
        pass
    d.denied.add(task.tool)
    case = d.sample(task)
    clause = d.say(task.clauses, case.slots)
    d.request(clause)
    d.assistant(d.say("cannot", clause=mirrored(clause)))
    if d.rng.random() < 0.4:
        d.user(d.say("accepted"))
        d.assistant(d.say("offer"))
    return task.tool


def unsafe(d: Dialogue) -> str:
    """A harmful request: declined, nothing is called."""
    other, firm = d.vocabulary["person"](), d.rng.choice(d.vocabulary["companies"])
    clause = d.say("unsafe", other=other, firm=firm)
    d.request(clause)
    d.assistant(d.say("refusals", target=other if other in clause else firm))
    return "declined"


def knowledge(d: Dialogue) -> str:
    """A question that needs no tool, answered directly."""
    if d.rng.random() < 0.3:
        a, b = d.rng.randint(2, 99), d.rng.randint(2, 99)
        question, answer = d.say("sums", a=a, b=b), d.say("sum_answers", a=a, b=b, total=a + b)
    else:
        question, _, answer = d.say("facts").partition(" => ")
    d.user(question)
    d.assistant(answer)
    return "known"


def greeting(d: Dialogue) -> str:
    """A greeting and its answer; it opens a conversation."""
    d.user(d.say("greetings"))
    d.assistant(d.say("greeted"))
    return "hello"


KINDS: dict[str, tuple[Callable[[Dialogue], str], int]] = {
    "single": (single, 20),
    "parallel": (parallel, 12),
    "partial": (partial, 4),
    "steps": (steps, 17),
    "fault": (fault, 8),
    "correction": (correction, 5),
    "clarify": (clarify, 11),
    "follow_up": (follow_up, 4),
    "confirm": (confirm, 5),
    "no_tool": (no_tool, 5),
    "unsafe": (unsafe, 3),
    "knowledge": (knowledge, 7),
    "greeting": (greeting, 4),
}
"""Every kind of exchange with its weight."""
