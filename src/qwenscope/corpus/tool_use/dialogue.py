"""A conversation in the making: what it says, which slots it draws, and the calls of tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from types import CodeType
from typing import Any

from qwenscope.corpus.tool_use.schema import Draws, Step, Task, Wording, content
from qwenscope.corpus.tool_use.values import spoken, upper_first, vocabulary

_ALTERNATIVES = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")


@dataclass(frozen=True)
class Case:
    """One call of a tool: the arguments, what it returns as the text of its message, and all that one may say of it."""

    tool: str
    arguments: dict[str, Any]
    content: str
    slots: dict[str, Any]


@cache
def tasks(kind: str) -> tuple[Task, ...]:
    """The tasks of a kind: `ordinary`, `careful`, `gap` or `lookup`."""
    wanted: dict[str, Callable[[Task], bool]] = {
        "ordinary": lambda task: not task.careful,
        "careful": lambda task: task.careful,
        "gap": lambda task: task.gap is not None,
        "lookup": lambda task: task.gap is not None and task.gap.lookup,
    }
    return tuple(filter(wanted[kind], content().tasks))


class Dialogue:
    """A conversation in the making: its messages, the tools it must and must not offer, and its families."""

    def __init__(self, rng: Random, held_out: bool) -> None:
        self.rng, self.held_out = rng, held_out
        self.vocabulary = vocabulary(rng, content().pools)
        self.messages: list[dict[str, Any]] = []
        self.families: list[str] = []
        self.asked = False
        self.offered: dict[str, None] = {}  # in order of first use; a set would depend on the hash seed
        self.denied: set[str] = set()
        words = self.vocabulary
        self.world = {
            "person": words["person"](),
            "first": rng.choice(words["first_names"]),
            "company": rng.choice(words["companies"]),
            "city": rng.choice(words["cities"]),
            "day": spoken(f"2024{words['any_day']()[4:]}"),  # before every date that a request names
        }

    def say(self, words: Wording | str, slots: dict[str, Any] | None = None, **more: Any) -> str:
        """One sentence of a wording (or of the one with that name), in this dialogue's split."""
        lines = (content().wordings[words] if isinstance(words, str) else words).of(self.held_out)
        line = self.rng.choice(lines)
        if "|" in line:
            line = _ALTERNATIVES.sub(lambda match: self.rng.choice(match[1].split("|")), line)
        return line.format_map({**self.world, **(slots or {}), **more})

    def draw(self, draws: Draws) -> dict[str, Any]:
        """The slots of an entry."""
        slots: dict[str, Any] = dict(self.rng.choice(draws.table.of(self.held_out))) if draws.table else {}
        names = {**self.vocabulary, **slots}
        for name, code in draws.expressions + (self.rng.choice(draws.cases) if draws.cases else ()):
            slots[name] = names[name] = eval(code, names)
        return slots

    def evaluate(self, code: CodeType, slots: dict[str, Any]) -> Any:
        """An expression over the slots."""
        return eval(code, {**self.vocabulary, **slots})

    def case(self, step: Step, slots: dict[str, Any]) -> Case:
        """One call; an argument that is None is left out."""
        names = {**self.vocabulary, **slots}
        arguments = {name: eval(code, names) for name, code in step.arguments}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        if not isinstance(step.result, tuple):
            return Case(step.tool, arguments, eval(step.result, names), slots)
        result = {name: eval(code, names) for name, code in step.result}
        return Case(step.tool, arguments, json.dumps(result, ensure_ascii=False), slots)

    def sample(self, task: Task) -> Case:
        """A case of a task."""
        return self.case(task.step, self.draw(task.draws))

    def user(self, text: str) -> None:
        """Add a user turn."""
        self.messages.append({"role": "user", "content": text})

    def request(self, clause: str) -> None:
        """Add a user turn that asks for `clause`, an imperative; later requests connect to the earlier ones."""
        frames = "next_frames" if self.asked and self.rng.random() < 0.6 else "frames"
        self.asked = True
        self.user(self.say(frames, clause=clause, Clause=upper_first(clause)))

    def assistant(self, text: str) -> None:
        """Add an assistant turn without calls."""
        self.messages.append({"role": "assistant", "content": text})

    def call(self, cases: list[Case], text: str = "") -> None:
        """Add an assistant turn with calls, and their results."""
        entries = [{"type": "function", "function": {"name": c.tool, "arguments": dict(c.arguments)}} for c in cases]
        self.messages.append({"role": "assistant", "content": text, "tool_calls": entries})
        for case in cases:
            self.offered[case.tool] = None
            self.messages.append({"role": "tool", "name": case.tool, "content": case.content})

    def lead(self, name: str) -> str:
        """What the assistant says beside a first call: often nothing."""
        return self.say("leads", tool=name) if self.rng.random() < 0.3 else ""

    def choose(self, kind: str) -> Task:
        """A task of a kind whose tool is not denied."""
        while (task := self.rng.choice(tasks(kind))).tool in self.denied:
            pass
        return task

    def failure(self, case: Case) -> tuple[Case, str]:
        """The same call with a passing error instead of its result, and the error's text."""
        error = self.say("errors", seconds=self.rng.choice((2, 5, 10, 15, 30, 60)))
        text = json.dumps({"error": error}) if self.rng.random() < 0.6 else f"Error: {error}"
        return Case(case.tool, case.arguments, text, case.slots), error
