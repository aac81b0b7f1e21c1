"""A file of steering experiments: conversations with canned tool results, traits to steer along, and checks of answers.

    traits:
      asks: {sae: sae_attn_mid, latent: 40, prompt: Ask what is meant before you act., check: asks}
    checks:
      asks: {asks: true}
      books: {calls: book_table}
    scenarios:
      - name: table
        messages: [{role: user, content: Book a table}]
        tools: [...]
        results: {book_table: ['{"booked": true}']}
        turns: [Now cancel it.]

docs/analysis.md shows a whole one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from qwenscope.errors import FormatError, reason
from qwenscope.recipe_keys import first_problem
from qwenscope.recipe_nodes import Node, Positive
from qwenscope.strict_yaml import YamlError, read_yaml

Position = Literal["all", "prefill", "decode"]
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_NAME = re.compile(r'<function=([^>\s]+)>|"name"\s*:\s*"([^"]+)"')
_QUESTION = re.compile("[?\uff1f\u061f]")


class Check(Node):
    """One thing that is looked for in a run's answers; exactly one key."""

    calls: str | None = None
    """A tool of this name is called."""
    asks: bool = False
    """There is a question in it."""
    matches: str | None = None
    """A regular expression that is found in it (re.search)."""
    words: tuple[int, int] | None = None
    """The answers have at least and at most so many words together."""

    @model_validator(mode="after")
    def _one(self) -> Check:
        if sum([self.calls is not None, self.asks, self.matches is not None, self.words is not None]) != 1:
            raise ValueError("a check has one of calls, asks: true, matches and words")
        return self

    @field_validator("matches")
    @classmethod
    def _compiles(cls, given: str | None) -> str | None:
        try:
            re.compile(given or "")
        except re.error as error:
            raise ValueError(f"is no regular expression ({error})") from None
        return given

    def holds(self, answers: list[str]) -> bool:
        """Whether it is so of a run's answers."""
        said = " ".join(_CALL.sub(" ", answer) for answer in answers)
        if self.calls is not None:
            return any(self.calls in tool_calls(answer) for answer in answers)
        if self.matches is not None:
            return any(re.search(self.matches, answer) for answer in answers)
        if self.words is not None:
            return self.words[0] <= len(said.split()) <= self.words[1]
        return _QUESTION.search(said) is not None


class Trait(Node):
    """What is steered along, and what is said in words instead."""

    sae: str
    latent: Annotated[int, Field(ge=0)]
    mode: Literal["add", "clamp"] = "add"
    prompt: str | None = None
    """The control without any push: this stands in the system message."""
    check: str
    """The check that it is meant to change."""


class Scenario(Node):
    """One conversation to go on with."""

    name: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    """Before the first answer."""
    turns: tuple[str, ...] = ()
    """What the user says after each answer."""
    tools: list[dict[str, Any]] | None = None
    """Schemas."""
    results: Annotated[dict[str, Annotated[list[str], Field(min_length=1)]], Field(default_factory=dict)]
    """What each tool returns, call by call; the last of them from then on."""


class Plan(Node):
    """All of a scenario file."""

    seed: int = 0
    max_new_tokens: Positive = 64
    """Of each answer."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    repeats: Positive = 1
    """Runs with seeds of their own."""
    strengths: Annotated[tuple[float, ...], Field(min_length=1)] = (0.1, 0.2, 0.4)
    """In norms of the row."""
    positions: Annotated[tuple[Position, ...], Field(min_length=1)] = ("all",)
    traits: Annotated[dict[str, Trait], Field(min_length=1)]
    checks: Annotated[dict[str, Check], Field(min_length=1)]
    scenarios: Annotated[list[Scenario], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Plan:
        names = [scenario.name for scenario in self.scenarios]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two scenarios are called {twice[0]}")
        if wrong := [trait.check for trait in self.traits.values() if trait.check not in self.checks]:
            raise ValueError(f"there is no check {wrong[0]}")
        if self.repeats > 1 and self.temperature == 0:
            raise ValueError("at temperature 0 all repeats are alike; set a temperature")
        if not all(self.strengths) or len(set(self.strengths)) < len(self.strengths):
            raise ValueError("strengths are different numbers, and none is 0: the unsteered model runs anyway")
        return self


def read_plan(path: Path) -> Plan:
    """Read a scenario file, YAML or JSON.

    Raises:
        FormatError: it cannot be read, or a key is unknown, missing or has an impossible value; names it.
    """
    try:
        return Plan.model_validate(read_yaml(path))
    except (YamlError, OSError) as error:
        raise FormatError(f"{path} is no scenario file: {reason(error)}") from None
    except ValidationError as error:
        raise FormatError(f"{path}: {first_problem(error, Plan, 'docs/analysis.md')}") from None


def tool_calls(answer: str) -> list[str]:
    """Names of the tools that an answer calls, in the formats of Qwen's and Hermes' chat templates.

    Examples:
        >>> tool_calls('<tool_call>\\n{"name": "search", "arguments": {}}\\n</tool_call>')
        ['search']
    """
    names = [_NAME.search(call) for call in _CALL.findall(answer)]
    return [name[1] or name[2] for name in names if name]
