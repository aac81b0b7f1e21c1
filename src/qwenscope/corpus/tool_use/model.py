"""The vocabulary of the generator: wordings, tool schemas, cases and tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

_ALTERNATIVES = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")


@dataclass(frozen=True)
class Wording:
    """Sentence skeletons of one meaning; the two splits never share one.

    A skeleton may hold `{slots}` and `[alternatives|like|these]`.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def of(self, held_out: bool) -> tuple[str, ...]:
        """The skeletons of one split."""
        return self.held_out if held_out else self.train


WORDINGS: list[Wording] = []
"""Every wording in use, so that the two splits can be compared."""


def wording(text: str) -> Wording:
    """Read skeletons from a block of lines: those of the train split, a line `---`, those of the held-out split.

    Raises:
        ValueError: a split has no skeleton, or both share one.
    """
    train, _, held_out = text.partition("---")
    parts = [tuple(line.strip() for line in part.splitlines() if line.strip()) for part in (train, held_out)]
    if not parts[0] or not parts[1] or set(parts[0]) & set(parts[1]):
        raise ValueError(f"a wording needs distinct skeletons on both sides of '---': {text!r}")
    WORDINGS.append(Wording(*parts))
    return WORDINGS[-1]


def fill(rng: Random, skeleton: str, slots: Mapping[str, Any]) -> str:
    """Choose the alternatives of a skeleton at random and fill in its slots."""
    if "|" in skeleton:
        skeleton = _ALTERNATIVES.sub(lambda match: rng.choice(match[1].split("|")), skeleton)
    return skeleton.format_map(slots)


@dataclass(frozen=True)
class Tool:
    """One tool: its name, interchangeable descriptions and the JSON schema of its arguments."""

    name: str
    descriptions: tuple[str, ...]
    properties: dict[str, dict[str, Any]]
    required: tuple[str, ...]

    def definition(self, rng: Random) -> dict[str, Any]:
        """A fresh function definition in the chat schema, with one of the descriptions."""
        parameters = {
            "type": "object",
            "properties": {name: dict(schema) for name, schema in self.properties.items()},
            "required": list(self.required),
        }
        function = {"name": self.name, "description": rng.choice(self.descriptions), "parameters": parameters}
        return {"type": "function", "function": function}


TOOLS: dict[str, Tool] = {}
"""Every tool by name, in the order of definition."""


def tool(name: str, descriptions: str, /, optional: tuple[str, ...] = (), **parameters: str) -> str:
    """Register a tool and return its name.

    Args:
        name: function name.
        descriptions: interchangeable descriptions, separated by `|`.
        optional: parameters that a call may leave out.
        parameters: `type: description` or `a/b/c: description` (an enumeration) for each parameter; the types are
            string, integer, number and numbers (a list).
    """
    properties = {parameter: _schema(text) for parameter, text in parameters.items()}
    required = tuple(parameter for parameter in parameters if parameter not in optional)
    TOOLS[name] = Tool(name, tuple(descriptions.split("|")), properties, required)
    return name


def _schema(text: str) -> dict[str, Any]:
    kind, _, description = text.partition(": ")
    if kind == "numbers":
        return {"type": "array", "items": {"type": "number"}, "description": description}
    if "/" in kind:
        return {"type": "string", "enum": kind.split("/"), "description": description}
    return {"type": kind, "description": description}


@dataclass(frozen=True)
class Case:
    """One concrete use of a tool: the arguments, what the tool returns, and further slots for the sentences."""

    arguments: dict[str, Any]
    result: Any
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """The tool's result as the text of its message."""
        return self.result if isinstance(self.result, str) else json.dumps(self.result, ensure_ascii=False)

    @property
    def slots(self) -> dict[str, Any]:
        """Everything that a sentence about this case may mention."""
        result = self.result if isinstance(self.result, dict) else {"result": self.result}
        return {**self.arguments, **result, **self.extra}


@dataclass(frozen=True)
class Gap:
    """How a request can lack something: vague requests, the question back, and the slot that answers it.

    `lookup` is true where the slot names a thing that the tool may fail to find.
    """

    vague: Wording
    question: Wording
    slot: str
    lookup: bool


@dataclass(frozen=True)
class Task:
    """Something that a user may want and one tool that does it.

    `clauses` are imperative and fit frames such as "Could you ...?"; `answers` are whole sentences; a `careful` task
    cannot be undone, so the assistant asks before it acts.
    """

    tool: str
    sample: Callable[[Random], Case]
    clauses: Wording
    answers: Wording
    gap: Gap | None
    careful: bool

    @property
    def domain(self) -> str:
        """The domain of the task: the name of the module that defines it."""
        return self.sample.__module__.rpartition(".")[2]


TASKS: list[Task] = []
"""Every task, in the order of definition."""


def task(
    tool: str,
    clauses: str,
    answers: str,
    gap: tuple[str, str, str] | None = None,
    lookup: bool = False,
    careful: bool = False,
) -> Callable[[Callable[[Random], Case]], Callable[[Random], Case]]:
    """Register the decorated sampler of cases as a task of `tool`.

    Args:
        clauses: wording block of the request, see `wording`.
        answers: wording block of the final answer.
        gap: (vague clauses, questions back, slot that answers them), where the request can be incomplete.
        lookup: that slot names a thing which the tool may fail to find.
        careful: the task cannot be undone.
    """

    def register(sample: Callable[[Random], Case]) -> Callable[[Random], Case]:
        missing = Gap(wording(gap[0]), wording(gap[1]), gap[2], lookup) if gap else None
        TASKS.append(Task(tool, sample, wording(clauses), wording(answers), missing, careful))
        return sample

    return register


Steps = list[tuple[str, Case]]
ChainSampler = Callable[[Random], tuple[Steps, dict[str, Any]]]


@dataclass(frozen=True)
class Chain:
    """A request that takes several calls in a row, each using an earlier result.

    `sample` returns (tool, case) pairs and the slots of the sentences; with a slot `stopped` the chain ended early and
    `otherwise` holds the answers. `links` is what the assistant says between two calls.
    """

    name: str
    tools: tuple[str, ...]
    sample: ChainSampler
    clauses: Wording
    links: Wording
    answers: Wording
    otherwise: Wording | None


CHAINS: list[Chain] = []
"""Every chain, in the order of definition."""


def chain(
    *tools: str, clauses: str, links: str, answers: str, otherwise: str | None = None
) -> Callable[[ChainSampler], ChainSampler]:
    """Register the decorated sampler as a chain over `tools`; the others are wording blocks, see `wording`."""

    def register(sample: ChainSampler) -> ChainSampler:
        ending = wording(otherwise) if otherwise else None
        words = (wording(clauses), wording(links), wording(answers), ending)
        CHAINS.append(Chain(sample.__name__, tools, sample, *words))
        return sample

    return register
