"""How conversations are put together: one function per kind of exchange."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from qwenscope.corpus.tool_use import chains, pools, talk
from qwenscope.corpus.tool_use import tasks_everyday as _everyday  # noqa: F401  (registers its tasks)
from qwenscope.corpus.tool_use import tasks_work as _work  # noqa: F401  (registers its tasks)
from qwenscope.corpus.tool_use.model import TASKS, TOOLS, Case, Task, Wording, fill, tool

tool(
    "ask_user",
    "Ask the user a question and return the reply.|Get missing information from the user.",
    question="string: Question for the user",
)


class Dialogue:
    """A conversation in the making: its messages, the tools it offers, and the families it was drawn from."""

    def __init__(self, rng: Random, held_out: bool) -> None:
        self.rng, self.held_out = rng, held_out
        self.messages: list[dict[str, Any]] = []
        self.families: list[str] = []
        self.offered: set[str] = set()
        self.denied: set[str] = set()
        name = pools.person(rng)
        self.world = {
            "person": name,
            "first": rng.choice(pools.FIRST_NAMES),
            "company": rng.choice(pools.COMPANIES),
            "city": rng.choice(pools.CITIES),
            "day": pools.spoken(pools.date(rng)),
        }

    def say(self, words: Wording, **slots: Any) -> str:
        """One sentence of a wording, in this dialogue's split."""
        return fill(self.rng, self.rng.choice(words.of(self.held_out)), {**self.world, **slots})

    def user(self, text: str) -> None:
        """Add a user turn."""
        self.messages.append({"role": "user", "content": text})

    def request(self, clause: str) -> None:
        """Add a user turn that asks for `clause`, an imperative."""
        self.user(self.say(talk.FRAMES, clause=clause, Clause=clause[0].upper() + clause[1:]))

    def assistant(self, text: str) -> None:
        """Add an assistant turn without calls."""
        self.messages.append({"role": "assistant", "content": text})

    def call(self, calls: list[tuple[str, Case]], text: str = "") -> None:
        """Add an assistant turn with calls, and their results."""
        entries = [
            {"type": "function", "function": {"name": name, "arguments": dict(case.arguments)}} for name, case in calls
        ]
        self.messages.append({"role": "assistant", "content": text, "tool_calls": entries})
        for name, case in calls:
            self.offered.add(name)
            self.messages.append({"role": "tool", "name": name, "content": case.content})

    def lead(self, name: str) -> str:
        """What the assistant says beside a first call: often nothing."""
        return self.say(talk.LEADS, tool=name) if self.rng.random() < 0.3 else ""

    def task(self, *, gap: bool = False, lookup: bool = False) -> Task:
        """A task whose tool is not denied; with a gap or a fallible lookup where asked for."""
        while True:
            chosen = self.rng.choice(TASKS)
            fits = (chosen.gap is not None or not gap) and (
                not lookup or (chosen.gap is not None and chosen.gap.lookup)
            )
            if fits and chosen.tool not in self.denied:
                return chosen


def single(d: Dialogue) -> str:
    """One request, one call, one answer."""
    task = d.task()
    case = task.sample(d.rng)
    d.request(d.say(task.clauses, **case.slots))
    d.call([(task.tool, case)], d.lead(task.tool))
    d.assistant(d.say(task.answers, **case.slots))
    return task.tool


def parallel(d: Dialogue) -> str:
    """Two or three independent calls in one turn, of one tool or of several."""
    count = 2 if d.rng.random() < 0.75 else 3
    tasks = [d.task()] * count if d.rng.random() < 0.45 else [d.task() for _ in range(count)]
    cases = [task.sample(d.rng) for task in tasks]
    clauses = [d.say(task.clauses, **case.slots) for task, case in zip(tasks, cases, strict=True)]
    joint = d.rng.choice(
        (" and ", ", and also ", "; then ") if not d.held_out else (", plus ", ", and on top of that ")
    )
    d.request(joint.join(clauses))
    d.call([(task.tool, case) for task, case in zip(tasks, cases, strict=True)], d.lead(tasks[0].tool))
    answers = [d.say(task.answers, **case.slots) for task, case in zip(tasks, cases, strict=True)]
    listed = d.rng.random() < 0.4
    d.assistant("\n- ".join([d.say(talk.BOTH), *answers]) if listed else " ".join(answers))
    return "+".join(task.tool for task in tasks)


def steps(d: Dialogue) -> str:
    """A chain of calls, each using the result of an earlier one."""
    while True:
        chain = d.rng.choice(chains.CHAINS)
        if not d.denied.intersection(chain.tools):
            break
    calls, slots = chain.sample(d.rng)
    d.request(d.say(chain.clauses, **slots))
    for number, call in enumerate(calls):
        link = d.say(chain.links, **slots) if number and d.rng.random() < 0.6 else ""
        d.call([call], link if number else d.lead(call[0]))
    d.assistant(d.say(chain.answers, **slots))
    return chain.name


def fault(d: Dialogue) -> str:
    """A tool that fails for a moment: the call is repeated, and either works or is given up honestly."""
    task = d.task()
    case = task.sample(d.rng)
    d.request(d.say(task.clauses, **case.slots))
    lead = d.lead(task.tool)
    for _ in range(2):
        error = d.say(talk.ERRORS, seconds=d.rng.choice((2, 5, 10, 15, 30, 60)))
        failed = Case(case.arguments, json.dumps({"error": error}) if d.rng.random() < 0.6 else f"Error: {error}")
        d.call([(task.tool, failed)], lead)
        lead = d.say(talk.RETRIES, tool=task.tool, error=error) if d.rng.random() < 0.7 else ""
        if d.rng.random() < 0.75:
            d.call([(task.tool, case)], lead)
            d.assistant(d.say(task.answers, **case.slots))
            return f"retry:{task.tool}"
    d.assistant(d.say(talk.GIVE_UP, tool=task.tool, error=error))
    return f"give-up:{task.tool}"


def correction(d: Dialogue) -> str:
    """A lookup that finds nothing; the user corrects the value."""
    task = d.task(lookup=True)
    assert task.gap is not None
    case, slot = task.sample(d.rng), task.gap.slot
    wrong = task.sample(d.rng).arguments[slot]
    if wrong == case.arguments[slot]:
        wrong = f"{wrong}x"
    d.request(d.say(task.clauses, **{**case.slots, slot: wrong}))
    error = json.dumps({"error": d.say(talk.NOT_FOUND, slot=slot, value=wrong)})
    d.call([(task.tool, Case({**case.arguments, slot: wrong}, error))], d.lead(task.tool))
    d.assistant(d.say(talk.ASK_AGAIN, value=wrong, label=slot.replace("_", " "), tool=task.tool))
    d.user(d.say(talk.REPLIES, value=case.arguments[slot]))
    d.call([(task.tool, case)])
    d.assistant(d.say(task.answers, **case.slots))
    return task.tool


def clarify(d: Dialogue) -> str:
    """A request that lacks something: the assistant asks, in words or through ask_user, and then acts."""
    task = d.task(gap=True)
    assert task.gap is not None
    case = task.sample(d.rng)
    d.request(d.say(task.gap.vague, **case.slots))
    question, reply = d.say(task.gap.question, **case.slots), d.say(talk.REPLIES, value=case.slots[task.gap.slot])
    if d.rng.random() < 0.35 and "ask_user" not in d.denied:
        d.call([("ask_user", Case({"question": question}, reply))])
    else:
        d.assistant(question)
        d.user(reply)
    d.call([(task.tool, case)], d.lead(task.tool))
    d.assistant(d.say(task.answers, **case.slots))
    return task.tool


def no_tool(d: Dialogue) -> str:
    """A request for which no tool is offered: the assistant says so and calls nothing."""
    while (task := d.task()).tool in d.offered:
        pass
    d.denied.add(task.tool)
    case = task.sample(d.rng)
    clause = d.say(task.clauses, **case.slots)
    d.request(clause)
    d.assistant(d.say(talk.CANNOT, clause=clause.replace(" me ", " you ").replace(" my ", " your ")))
    if d.rng.random() < 0.4:
        d.user(d.say(talk.ACCEPTED))
        d.assistant(d.say(talk.WELCOME))
    return task.tool


def unsafe(d: Dialogue) -> str:
    """A harmful request: declined, nothing is called."""
    clause = d.say(talk.UNSAFE)
    d.request(clause)
    target = d.world["person"] if d.world["person"] in clause else d.world["company"]
    d.assistant(d.say(talk.REFUSALS, target=target))
    return "declined"


def knowledge(d: Dialogue) -> str:
    """A question that needs no tool, answered directly."""
    if d.rng.random() < 0.5:
        a, b = d.rng.randint(2, 99), d.rng.randint(2, 99)
        question, answer = d.say(talk.SUMS, a=a, b=b), d.say(talk.SUM_ANSWERS, a=a, b=b, total=a + b)
    else:
        question, answer = d.rng.choice(talk.HELD_OUT_FACTS if d.held_out else talk.FACTS).split("|")
    d.user(question)
    d.assistant(answer)
    return "known"


def small_talk(d: Dialogue) -> str:
    """A greeting and its answer."""
    d.user(d.say(talk.GREETINGS))
    d.assistant(d.say(talk.GREETED))
    return "greeting"


KINDS: dict[str, tuple[Callable[[Dialogue], str], int]] = {
    "single": (single, 24),
    "parallel": (parallel, 14),
    "steps": (steps, 17),
    "fault": (fault, 12),
    "correction": (correction, 5),
    "clarify": (clarify, 12),
    "no_tool": (no_tool, 6),
    "unsafe": (unsafe, 4),
    "knowledge": (knowledge, 6),
    "small_talk": (small_talk, 4),
}
"""Every kind of exchange with its weight."""

_CHAT = frozenset({"knowledge", "small_talk", "unsafe"})
_NAMES, _WEIGHTS = tuple(KINDS), tuple(weight for _, weight in KINDS.values())


def compose(rng: Random, held_out: bool) -> tuple[Dialogue, list[dict[str, Any]]]:
    """Draw one conversation: its dialogue and the tools offered, in shuffled order."""
    d = Dialogue(rng, held_out)
    if rng.random() < 0.55:
        rules = [d.say(talk.RULES) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
        d.messages.append({"role": "system", "content": " ".join([d.say(talk.SYSTEM), *dict.fromkeys(rules)])})
    kinds = rng.choices(_NAMES, _WEIGHTS, k=rng.choice((1, 1, 1, 2, 2, 3)))
    if _CHAT.issuperset(kinds):
        kinds.append(rng.choice(("single", "parallel", "steps")))
    split = "held-out" if held_out else "train"
    for kind in kinds:
        d.families.append(f"{split}/{kind}/{KINDS[kind][0](d)}")
    if rng.random() < 0.2:
        d.user(d.say(talk.THANKS))
        d.assistant(d.say(talk.WELCOME))
    names = list(d.offered)
    names.sort()
    others = [name for name in TOOLS if name not in d.offered and name not in d.denied]
    names += rng.sample(others, min(len(others), rng.randint(0 if names else 1, 5)))
    rng.shuffle(names)
    return d, [TOOLS[name].definition(rng) for name in names]
