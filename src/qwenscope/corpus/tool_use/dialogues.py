"""The kinds of exchange a conversation is made of: each function adds one to a dialogue and returns its subject."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

from qwenscope.corpus.tool_use import facts, pools, talk
from qwenscope.corpus.tool_use.chains import CHAINS
from qwenscope.corpus.tool_use.model import Case, Task, Wording, fill
from qwenscope.corpus.tool_use.tasks import TASKS

_MIRROR = {"me": "you", "my": "your", "I": "you", "us": "you", "mine": "yours"}
_FIRST_PERSON = re.compile(r"\b(?:me|my|I|us|mine)\b")
_LOOKUPS = tuple(task for task in TASKS if task.gap and task.gap.lookup)
_GAPS = tuple(task for task in TASKS if task.gap)
_CAREFUL = tuple(task for task in TASKS if task.careful)
_ORDINARY = tuple(task for task in TASKS if not task.careful)


class Dialogue:
    """A conversation in the making: its messages, the tools it must and must not offer, and its families."""

    def __init__(self, rng: Random, held_out: bool) -> None:
        self.rng, self.held_out = rng, held_out
        self.messages: list[dict[str, Any]] = []
        self.families: list[str] = []
        self.asked = False
        self.offered: dict[str, None] = {}  # in order of first use; a set would depend on the hash seed
        self.denied: set[str] = set()
        self.world = {
            "person": pools.person(rng),
            "first": rng.choice(pools.FIRST_NAMES),
            "company": rng.choice(pools.COMPANIES),
            "city": rng.choice(pools.CITIES),
            "day": pools.spoken(f"2024{pools.date(rng)[4:]}"),  # before every date that a request names
        }

    def say(self, words: Wording, slots: dict[str, Any] | None = None, **more: Any) -> str:
        """One sentence of a wording, in this dialogue's split."""
        return fill(self.rng, self.rng.choice(words.of(self.held_out)), {**self.world, **(slots or {}), **more})

    def user(self, text: str) -> None:
        """Add a user turn."""
        self.messages.append({"role": "user", "content": text})

    def request(self, clause: str) -> None:
        """Add a user turn that asks for `clause`, an imperative; later requests connect to the earlier ones."""
        frames = talk.NEXT_FRAMES if self.asked and self.rng.random() < 0.6 else talk.FRAMES
        self.asked = True
        self.user(self.say(frames, clause=clause, Clause=clause[0].upper() + clause[1:]))

    def assistant(self, text: str) -> None:
        """Add an assistant turn without calls."""
        self.messages.append({"role": "assistant", "content": text})

    def call(self, calls: list[tuple[str, Case]], text: str = "") -> None:
        """Add an assistant turn with calls, and their results."""
        entries = [{"type": "function", "function": {"name": n, "arguments": dict(c.arguments)}} for n, c in calls]
        self.messages.append({"role": "assistant", "content": text, "tool_calls": entries})
        for name, case in calls:
            self.offered[name] = None
            self.messages.append({"role": "tool", "name": name, "content": case.content})

    def lead(self, name: str) -> str:
        """What the assistant says beside a first call: often nothing."""
        return self.say(talk.LEADS, tool=name) if self.rng.random() < 0.3 else ""

    def choose(self, tasks: tuple[Task, ...]) -> Task:
        """A task whose tool is not denied."""
        while (task := self.rng.choice(tasks)).tool in self.denied:
            pass
        return task

    def failure(self, case: Case) -> tuple[Case, str]:
        """The same call with a passing error instead of its result, and the error's text."""
        error = self.say(talk.ERRORS, seconds=self.rng.choice((2, 5, 10, 15, 30, 60)))
        content = json.dumps({"error": error}) if self.rng.random() < 0.6 else f"Error: {error}"
        return Case(case.arguments, content), error


def mirrored(clause: str) -> str:
    """A user's clause as the assistant repeats it: my becomes your, except inside quotes."""
    parts = clause.split('"')
    parts[::2] = [_FIRST_PERSON.sub(lambda match: _MIRROR[match[0]], part) for part in parts[::2]]
    return '"'.join(parts)


def single(d: Dialogue) -> str:
    """One request, one call, one answer."""
    task = d.choose(_ORDINARY)
    case = task.sample(d.rng)
    d.request(d.say(task.clauses, case.slots))
    d.call([(task.tool, case)], d.lead(task.tool))
    d.assistant(d.say(task.answers, case.slots))
    return task.tool


def _several(d: Dialogue) -> list[tuple[Task, Case]]:
    count = 2 if d.rng.random() < 0.75 else 3
    tasks = [d.choose(_ORDINARY)] * count if d.rng.random() < 0.45 else [d.choose(_ORDINARY) for _ in range(count)]
    pairs = [(task, task.sample(d.rng)) for task in tasks]
    d.request(d.say(talk.JOINTS).replace("_", " ").join(d.say(task.clauses, case.slots) for task, case in pairs))
    return pairs


def _report(d: Dialogue, pairs: list[tuple[Task, Case]]) -> None:
    answers = [d.say(task.answers, case.slots) for task, case in pairs]
    d.assistant("\n- ".join([d.say(talk.TOGETHER), *answers]) if d.rng.random() < 0.4 else " ".join(answers))


def parallel(d: Dialogue) -> str:
    """Two or three independent calls in one turn, of one tool or of several."""
    pairs = _several(d)
    d.call([(task.tool, case) for task, case in pairs], d.lead(pairs[0][0].tool))
    _report(d, pairs)
    return "+".join(task.tool for task, _ in pairs)


def partial(d: Dialogue) -> str:
    """Parallel calls of which one fails: only that one is repeated."""
    pairs = _several(d)
    broken = d.rng.randrange(len(pairs))
    task, case = pairs[broken]
    failed, error = d.failure(case)
    d.call([(t.tool, failed if i == broken else c) for i, (t, c) in enumerate(pairs)], d.lead(pairs[0][0].tool))
    d.call([(task.tool, case)], d.say(talk.PARTLY, tool=task.tool, error=error))
    _report(d, pairs)
    return "+".join(task.tool for task, _ in pairs)


def steps(d: Dialogue) -> str:
    """A chain of calls, each using the result of an earlier one."""
    while d.denied.intersection((chain := d.rng.choice(CHAINS)).tools):
        pass
    calls, slots = chain.sample(d.rng)
    d.request(d.say(chain.clauses, slots))
    d.call(calls[:1], d.lead(calls[0][0]))
    for call in calls[1:]:
        d.call([call], d.say(chain.links, slots) if d.rng.random() < 0.6 else "")
    if "stopped" in slots:
        assert chain.otherwise is not None
        d.assistant(d.say(chain.otherwise, slots))
        return f"{chain.name}-stopped"
    d.assistant(d.say(chain.answers, slots))
    return chain.name


def fault(d: Dialogue) -> str:
    """A tool that fails for a moment: the call is repeated, and either works or is given up honestly."""
    task = d.choose(_ORDINARY)
    case = task.sample(d.rng)
    d.request(d.say(task.clauses, case.slots))
    failed, error = d.failure(case)
    d.call([(task.tool, failed)], d.lead(task.tool))
    retry = d.say(talk.RETRIES, tool=task.tool, error=error) if d.rng.random() < 0.7 else ""
    if d.rng.random() < 0.75:
        d.call([(task.tool, case)], retry)
        d.assistant(d.say(task.answers, case.slots))
        return task.tool
    failed, error = d.failure(case)
    d.call([(task.tool, failed)], retry)
    d.assistant(d.say(talk.GIVE_UP, tool=task.tool, error=error))
    return f"{task.tool}-given-up"


def correction(d: Dialogue) -> str:
    """A mistyped value that the tool does not find; the user corrects it."""
    task = d.choose(_LOOKUPS)
    assert task.gap is not None
    case, slot = task.sample(d.rng), task.gap.slot
    right = case.arguments[slot]
    wrong = pools.mistyped(d.rng, right)
    d.request(d.say(task.clauses, case.slots, **{slot: wrong}))
    error = json.dumps({"error": d.say(talk.NOT_FOUND, slot=slot, value=wrong)})
    d.call([(task.tool, Case({**case.arguments, slot: wrong}, error))], d.lead(task.tool))
    d.assistant(d.say(talk.ASK_AGAIN, value=wrong, label=slot.replace("_", " "), tool=task.tool))
    d.user(d.say(talk.REPLIES, value=right))
    d.call([(task.tool, case)])
    d.assistant(d.say(task.answers, case.slots))
    return task.tool


def clarify(d: Dialogue) -> str:
    """A request that lacks something: the assistant asks, in words or through ask_user, and then acts."""
    task = d.choose(_GAPS)
    assert task.gap is not None
    case = task.sample(d.rng)
    d.request(d.say(task.gap.vague, case.slots))
    question, reply = d.say(task.gap.question, case.slots), d.say(talk.REPLIES, value=case.slots[task.gap.slot])
    if d.rng.random() < 0.35:
        d.call([("ask_user", Case({"question": question}, reply))])
    else:
        d.assistant(question)
        d.user(reply)
    d.call([(task.tool, case)], d.lead(task.tool))
    d.assistant(d.say(task.answers, case.slots))
    return task.tool


def follow_up(d: Dialogue) -> str:
    """A request, then the same again for another value in half a sentence."""
    while True:
        task = d.choose(_LOOKUPS)
        assert task.gap is not None
        first, second = task.sample(d.rng), task.sample(d.rng)
        if set(second.arguments) == {task.gap.slot} and first.arguments != second.arguments:
            break
    d.request(d.say(task.clauses, first.slots))
    d.call([(task.tool, first)], d.lead(task.tool))
    d.assistant(d.say(task.answers, first.slots))
    d.user(d.say(talk.AGAIN, value=second.arguments[task.gap.slot]))
    d.call([(task.tool, second)])
    d.assistant(d.say(task.answers, second.slots))
    return task.tool


def confirm(d: Dialogue) -> str:
    """Something that cannot be undone: the assistant asks first, and a no is respected."""
    task = d.choose(_CAREFUL)
    case = task.sample(d.rng)
    clause = d.say(task.clauses, case.slots)
    d.request(clause)
    d.assistant(d.say(talk.CONFIRM, clause=mirrored(clause)))
    d.offered[task.tool] = None
    if d.rng.random() < 0.3:
        d.user(d.say(talk.NO))
        d.assistant(d.say(talk.LEFT))
        return f"{task.tool}-withdrawn"
    d.user(d.say(talk.YES))
    d.call([(task.tool, case)])
    d.assistant(d.say(task.answers, case.slots))
    return task.tool


def no_tool(d: Dialogue) -> str:
    """A request for which no tool is offered: the assistant says so and calls nothing."""
    while (task := d.choose(_ORDINARY)).tool in d.offered:
        pass
    d.denied.add(task.tool)
    case = task.sample(d.rng)
    clause = d.say(task.clauses, case.slots)
    d.request(clause)
    d.assistant(d.say(talk.CANNOT, clause=mirrored(clause)))
    if d.rng.random() < 0.4:
        d.user(d.say(talk.ACCEPTED))
        d.assistant(d.say(talk.OFFER))
    return task.tool


def unsafe(d: Dialogue) -> str:
    """A harmful request: declined, nothing is called."""
    other, firm = pools.person(d.rng), d.rng.choice(pools.COMPANIES)
    clause = d.say(talk.UNSAFE, other=other, firm=firm)
    d.request(clause)
    d.assistant(d.say(talk.REFUSALS, target=other if other in clause else firm))
    return "declined"


def knowledge(d: Dialogue) -> str:
    """A question that needs no tool, answered directly."""
    if d.rng.random() < 0.3:
        a, b = d.rng.randint(2, 99), d.rng.randint(2, 99)
        question, answer = d.say(talk.SUMS, a=a, b=b), d.say(talk.SUM_ANSWERS, a=a, b=b, total=a + b)
    else:
        question, _, answer = d.say(facts.FACTS).partition(" => ")
    d.user(question)
    d.assistant(answer)
    return "known"


def greeting(d: Dialogue) -> str:
    """A greeting and its answer; it opens a conversation."""
    d.user(d.say(talk.GREETINGS))
    d.assistant(d.say(talk.GREETED))
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
