"""What the content files hold, read and checked once.

A file `content/*.yaml` may have the sections `pools`, `tables`, `wordings`, `tools`, `tasks`, `chains`, `systems` and
`topics`; docs/corpus.md shows an entry of each. A wording is a block of lines, each a sentence skeleton with `{slots}`
and `[alternatives|like|these]`. Its lines, and the rows of a table, are held out by hash: the two splits share none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from types import CodeType
from typing import Any, Generic, TypeVar

import yaml

from qwenscope.corpus.tool_use.values import NAMES, expression
from qwenscope.errors import CorpusError

FOLDER = Path(__file__).parent / "content"
WORLD = frozenset({"person", "first", "company", "city", "day"})
"""Slots that every sentence of a conversation may use."""
HELD_OUT_SHARE = 3
"""One line in three is held out, at least one of each wording."""

T = TypeVar("T")
Section = dict[str, Any]


@dataclass(frozen=True)
class Split(Generic[T]):
    """Lines of a wording or rows of a table, the two splits apart."""

    train: tuple[T, ...]
    held_out: tuple[T, ...]

    def of(self, held_out: bool) -> tuple[T, ...]:
        """Those of one split."""
        return self.held_out if held_out else self.train


Wording = Split[str]
Table = Split[dict[str, str]]


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


@dataclass(frozen=True)
class Draws:
    """How the slots of an entry are drawn: a row of a table, then expressions, then those of one of the cases."""

    table: Table | None
    expressions: tuple[tuple[str, CodeType], ...]
    cases: tuple[tuple[tuple[str, CodeType], ...], ...]


@dataclass(frozen=True)
class Step:
    """One call: the tool, its arguments and its result as expressions over the slots."""

    tool: str
    arguments: tuple[tuple[str, CodeType], ...]
    result: tuple[tuple[str, CodeType], ...] | CodeType


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

    domain: str
    draws: Draws
    step: Step
    clauses: Wording
    answers: Wording
    gap: Gap | None
    careful: bool

    @property
    def tool(self) -> str:
        """Name of the tool."""
        return self.step.tool


@dataclass(frozen=True)
class Stop:
    """When a chain ends early, after how many steps, and what is said then."""

    when: CodeType
    after: int
    answers: Wording


@dataclass(frozen=True)
class Chain:
    """A request that takes several calls in a row, each using an earlier result; `links` stand between two calls."""

    name: str
    draws: Draws
    steps: tuple[Step, ...]
    clauses: Wording
    links: Wording
    answers: Wording
    stop: Stop | None

    @property
    def tools(self) -> tuple[str, ...]:
        """Names of the tools, one per step."""
        return tuple(step.tool for step in self.steps)


@dataclass(frozen=True)
class Topic:
    """Something to chat about: a first question and answer, and those that may follow, in order."""

    name: str
    draws: Draws
    turns: tuple[tuple[Wording, Wording], ...]
    weight: int


@dataclass(frozen=True)
class Content:
    """All content files together."""

    pools: dict[str, tuple[Any, ...]]
    wordings: dict[str, Wording]
    tools: dict[str, Tool]
    tasks: tuple[Task, ...]
    chains: tuple[Chain, ...]
    topics: tuple[Topic, ...]


@cache
def content(folder: Path = FOLDER) -> Content:
    """Read and check the content files.

    Raises:
        CorpusError: an entry is not what it should be; names file and key.
    """
    return _Reader(folder).read()


class _Reader:
    """Reads a folder of content; knows where it is, for messages."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Section] = {}
        self.where = ""
        self.sides: dict[str, tuple[bool, str]] = {}
        for path in sorted(folder.glob("*.yaml")):
            self.where = path.name
            try:
                document = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            except yaml.YAMLError as error:
                raise self.wrong(f"not YAML: {error}") from error
            self.files[path.name] = self.mapping(document, _SECTIONS)

    def read(self) -> Content:
        self.pools = dict(self.each("pools", self.pool))
        self.tables = dict(self.each("tables", self.table))
        wordings = dict(self.each("wordings", lambda name, value: self.wording(value)))
        self.tools = dict(self.each("tools", self.tool))
        tasks = tuple(task for _, task in self.each("tasks", self.task))
        chains = tuple(chain for _, chain in self.each("chains", self.chain))
        topics = tuple(topic for _, topic in self.each("topics", self.topic))
        return Content(self.pools, wordings, self.tools, tasks, chains, topics)

    def wrong(self, why: str) -> CorpusError:
        return CorpusError(f"{self.where}: {why}")

    def each(self, section: str, read: Callable[[str, Any], T]) -> Iterator[tuple[str, T]]:
        """The entries of a section in all files, each name once."""
        seen: set[str] = set()
        for file, document in self.files.items():
            for name, value in (document.get(section) or {}).items():
                self.where, self.domain = f"{file}, {section}.{name}", file.removesuffix(".yaml")
                if name in seen:
                    raise self.wrong("another entry has this name")
                seen.add(name)
                yield name, read(name, value)

    def mapping(self, value: Any, keys: Collection[str], needed: Collection[str] = ()) -> Section:
        """`value` as a mapping with the needed keys and none but `keys`."""
        if not isinstance(value, dict):
            raise self.wrong(f"needs the keys {', '.join(needed or keys)}")
        if unknown := [key for key in value if key not in keys]:
            raise self.wrong(f"unknown key {unknown[0]!r}; the keys are {', '.join(keys)}")
        if missing := [key for key in needed if key not in value]:
            raise self.wrong(f"key {missing[0]!r} is missing")
        return value

    def pool(self, name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not value:
            raise self.wrong("a pool is a list")
        return tuple(value)

    def table(self, name: str, value: Any) -> Table:
        """A block of lines with cells between bars: the names of the columns, then the rows."""
        header, *rows = [[cell.strip() for cell in line.split(" | ")] for line in self.lines(value)]
        for row in rows:
            if len(row) != len(header):
                raise self.wrong(f"the row {row[0]!r} has {len(row)} cells, the header {len(header)}")
        return self.divide([dict(zip(header, row, strict=True)) for row in rows], lambda row: row[header[0]])

    def lines(self, value: Any) -> list[str]:
        if not isinstance(value, str):
            raise self.wrong("needs a block of lines")
        return [line.strip().replace("\\n", "\n") for line in value.splitlines() if line.strip()]

    def wording(self, value: Any, slots: Collection[str] | None = None) -> Wording:
        """Skeletons of one meaning, which may use `slots` (not checked where None) and those of the world."""
        lines = self.lines(value)
        for line in lines:
            for slot in _SLOT.findall(line):
                if slots is not None and slot not in slots and slot not in WORLD:
                    raise self.wrong(f"{line!r} uses the slot {slot}, which is not drawn")
        split = self.divide(lines, str)
        for held_out in (False, True):
            for line in filter(_WORDS.search, split.of(held_out)):  # a line of slots alone has no wording of its own
                side, where = self.sides.setdefault(_plain(line), (held_out, self.where))
                if side != held_out:
                    raise self.wrong(f"{line!r} is of the other split in {where}; word one of them differently")
        return split

    def divide(self, items: Sequence[T], text: Callable[[T], str]) -> Split[T]:
        """Hold out the third with the smallest hash of their text."""
        if len(set(map(text, items))) < max(2, len(items)):
            raise self.wrong("needs two lines or more, all different: one for each split")
        digests = [hashlib.blake2b(_plain(text(item)).encode()).digest() for item in items]
        limit = sorted(digests)[max(1, len(items) // HELD_OUT_SHARE)]
        held = [digest < limit for digest in digests]
        pairs = list(zip(items, held, strict=True))
        return Split(tuple(item for item, out in pairs if not out), tuple(item for item, out in pairs if out))

    def tool(self, name: str, value: Any) -> Tool:
        tool = self.mapping(value, ("descriptions", "parameters", "optional"), ("descriptions", "parameters"))
        properties = {key: self.parameter(text) for key, text in tool["parameters"].items()}
        required = tuple(key for key in properties if key not in tool.get("optional", ()))
        return Tool(name, tuple(self.lines(tool["descriptions"])), properties, required)

    def parameter(self, text: str) -> dict[str, Any]:
        """`type: description`, or `a/b/c: description` for an enumeration; the type `numbers` is a list."""
        kind, separator, description = str(text).partition(": ")
        if not separator or (kind not in _TYPES and "/" not in kind):
            raise self.wrong(f"the parameter {text!r} is not `type: description`")
        if kind == "numbers":
            return {"type": "array", "items": {"type": "number"}, "description": description}
        if "/" in kind:
            return {"type": "string", "enum": kind.split("/"), "description": description}
        return {"type": kind, "description": description}

    def draws(self, entry: Section) -> tuple[Draws, set[str]]:
        """The draws of an entry, and the slots that they fill."""
        name = entry.get("table")
        if name is not None and name not in self.tables:
            raise self.wrong(f"there is no table {name}")
        table = self.tables[name] if name is not None else None
        slots = set(table.train[0]) if table else set()
        drawn = self.expressions(entry.get("draw") or {}, slots)
        cases = []
        for case in entry.get("cases") or ():
            cases.append(self.expressions(case, own := set(slots)))
        slots |= own if cases else set()
        if taken := slots & (NAMES | self.pools.keys()):
            raise self.wrong(f"the slot {min(taken)} has the name of a function or of a pool")
        return Draws(table, drawn, tuple(cases)), slots

    def expressions(self, value: Any, slots: set[str]) -> tuple[tuple[str, CodeType], ...]:
        """Expressions by name, each of which may use those before it; adds the names to `slots`."""
        if isinstance(value, list):
            value = {name: name for name in value}
        compiled = []
        for name, text in value.items():
            compiled.append((name, self.expression(text, slots)))
            slots.add(name)
        return tuple(compiled)

    def expression(self, text: Any, slots: set[str]) -> CodeType:
        try:
            return expression(text if isinstance(text, str) else repr(text), slots | self.pools.keys())
        except ValueError as error:
            raise self.wrong(str(error)) from error

    def step(self, entry: Section, slots: set[str]) -> Step:
        if entry["tool"] not in self.tools:
            raise self.wrong(f"there is no tool {entry['tool']}")
        for key in entry["arguments"]:
            if key not in self.tools[entry["tool"]].properties:
                raise self.wrong(f"{entry['tool']} has no parameter {key}")
        result = entry["result"]
        read = self.expression if isinstance(result, str) else self.expressions
        return Step(entry["tool"], self.expressions(entry["arguments"], set(slots)), read(result, set(slots)))

    def task(self, name: str, value: Any) -> Task:
        entry = self.mapping(value, (*_DRAWS, *_STEP, *_SAID, "gap", "careful"), (*_STEP, *_SAID))
        draws, slots = self.draws(entry)
        gap = None
        if "gap" in entry:
            lack = self.mapping(entry["gap"], ("vague", "question", "slot", "lookup"), ("vague", "question", "slot"))
            if lack["slot"] not in slots:
                raise self.wrong(f"gap.slot {lack['slot']} is not drawn")
            vague, question = (self.wording(lack[key], slots) for key in ("vague", "question"))
            gap = Gap(vague, question, lack["slot"], lack.get("lookup", False))
        clauses, answers = (self.wording(entry[key], slots) for key in _SAID)
        return Task(self.domain, draws, self.step(entry, slots), clauses, answers, gap, entry.get("careful", False))

    def chain(self, name: str, value: Any) -> Chain:
        entry = self.mapping(value, (*_DRAWS, "steps", *_SAID, "links", "stop"), ("steps", *_SAID, "links"))
        draws, slots = self.draws(entry)
        steps = tuple(self.step(self.mapping(step, _STEP, _STEP), slots) for step in entry["steps"])
        clauses, answers, links = (self.wording(entry[key], slots) for key in (*_SAID, "links"))
        stop = None
        if "stop" in entry:
            early = self.mapping(entry["stop"], keys := ("when", "after", "answers"), keys)
            stop = Stop(self.expression(early["when"], slots), early["after"], self.wording(early["answers"], slots))
        return Chain(name, draws, steps, clauses, links, answers, stop)

    def topic(self, name: str, value: Any) -> Topic:
        entry = self.mapping(value, (*_DRAWS, "turns", "weight"), ("turns",))
        draws, slots = self.draws(entry)
        turns = [self.mapping(turn, ("ask", "answer"), ("ask", "answer")) for turn in entry["turns"]]
        pairs = tuple((self.wording(turn["ask"], slots), self.wording(turn["answer"], slots)) for turn in turns)
        return Topic(name, draws, pairs, entry.get("weight", 1))


def _plain(line: str) -> str:
    """What counts as the same wording: slots without their names, no case, no mark at the end."""
    return _SLOT.sub("{", line).casefold().rstrip(".!?")


_SECTIONS = ("pools", "tables", "wordings", "tools", "tasks", "chains", "topics")
_DRAWS, _STEP, _SAID = ("table", "draw", "cases"), ("tool", "arguments", "result"), ("clauses", "answers")
_TYPES = ("string", "integer", "number", "numbers")
_SLOT = re.compile(r"\{(\w+)")
_WORDS = re.compile(r"[^\W\d_](?![^{]*\})")
