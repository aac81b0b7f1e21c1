"""Conversations by number: those with tools, made of exchanges, and plain chat, made of topics.

Conversation `index` is a pure function of (kind, seed, index, held_out): any range can be generated without the ones
before it. The wordings of the train and of the held-out split are disjoint, so held-out conversations are new
sentences about the same things.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Protocol

from qwenscope.corpus.tool_use.dialogue import Dialogue
from qwenscope.corpus.tool_use.exchanges import KINDS
from qwenscope.corpus.tool_use.schema import Topic, content
from qwenscope.errors import CorpusError
from qwenscope.files import atomic_path


class Generator(Protocol):
    """What makes conversation number `index` of a seed."""

    def __call__(self, seed: int, index: int, *, held_out: bool = False) -> dict[str, Any]: ...


_NAMES, _WEIGHTS = tuple(KINDS), tuple(weight for _, weight in KINDS.values())
_TALK = frozenset({"knowledge", "greeting", "unsafe"})
_USEFUL = ("single", "parallel", "steps", "clarify")


def tool_use_conversation(seed: int, index: int, *, held_out: bool = False) -> dict[str, Any]:
    """Tool-use conversation number `index` of a seed.

    Returns:
        {"messages": [...], "tools": [...]}: messages {role, content}, assistant turns with calls carry `tool_calls`
        ({type, function: {name, arguments: mapping}}), tool messages a `name`; tools are function definitions with a
        JSON schema of their parameters.

    Raises:
        CorpusError: a content file is not what it should be.
    """
    d = _with_tools(seed, index, held_out)
    return {"messages": d.messages, "tools": _tools(d)}


def conversation_families(seed: int, index: int, *, held_out: bool = False) -> tuple[str, ...]:
    """What a tool-use conversation is made of, as `split/kind/subject` in order: `train/single/get_weather`."""
    return tuple(_with_tools(seed, index, held_out).families)


def chat_conversation(seed: int, index: int, *, held_out: bool = False) -> dict[str, Any]:
    """Chat number `index` of a seed: an optional system prompt, one to three topics with what follows, a farewell.

    Returns:
        {"messages": [...]}: messages {role, content}.

    Raises:
        CorpusError: a content file is not what it should be.
    """
    d = _dialogue("chat", seed, index, held_out)
    if d.rng.random() < 0.35:
        d.messages.append({"role": "system", "content": d.say("chat_systems")})
    if greeted := d.rng.random() < 0.1:
        d.user(d.say("chat_greetings"))
        d.assistant(d.say("chat_greeted"))
    count = d.rng.choice((1, *[2] * 9, 3, 3))
    for number, topic in enumerate(_topics(d, count)):
        frame = ("chat_switches", 0.6) if number else ("chat_openings", 0.0 if greeted else 0.25)
        _talk_about(d, topic, *frame, fewest=2 if count == 1 else 1)
    if d.rng.random() < 0.3:
        d.user(d.say("chat_thanks"))
        d.assistant(d.say("chat_welcome"))
    return {"messages": d.messages}


GENERATORS: dict[str, Generator] = {"tool_use": tool_use_conversation, "chat": chat_conversation}
"""Generators by the name of their corpus source."""


def generate_tool_use(n: int, seed: int, *, start: int = 0, held_out: bool = False) -> Iterator[dict[str, Any]]:
    """Tool-use conversations `start` ... `start + n - 1` of a seed, one by one."""
    for index in range(start, start + n):
        yield tool_use_conversation(seed, index, held_out=held_out)


def write_tool_use(path: Path, n: int, seed: int, *, held_out: bool = False) -> None:
    """Write the first `n` tool-use conversations of a seed as JSON lines (compressed for .gz), whole or not at all.

    Raises:
        CorpusError: `n` is not positive, the name is neither .jsonl nor .jsonl.gz, or the folder is missing.
        ResourceError: the disk is full.
    """
    if n < 1:
        raise CorpusError(f"cannot write {n} conversations to {path}; ask for at least 1")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise CorpusError(f"{path} must end in .jsonl or .jsonl.gz")
    if not path.parent.is_dir():
        raise CorpusError(f"the folder {path.parent} does not exist; create it first")
    rows = generate_tool_use(n, seed, held_out=held_out)
    lines = (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    with atomic_path(path) as temporary, temporary.open("wb") as raw:
        if path.suffix == ".gz":  # no name and no time in the header: the same conversations give the same bytes
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
                file.writelines(lines)
        else:
            raw.writelines(lines)


def _dialogue(kind: str, seed: int, index: int, held_out: bool) -> Dialogue:
    key = f"qwenscope/{kind}/{'held-out' if held_out else 'train'}/{seed}/{index}".encode()
    return Dialogue(Random(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest())), held_out)


def _with_tools(seed: int, index: int, held_out: bool) -> Dialogue:
    """An optional system prompt, one to four exchanges, an optional farewell."""
    d = _dialogue("tool-use", seed, index, held_out)
    if d.rng.random() < 0.6:
        rules = [d.say("rules") for _ in range(d.rng.choice((0, 0, 1, 1, 2, 3)))]
        d.messages.append({"role": "system", "content": " ".join([d.say("system"), *dict.fromkeys(rules)])})
    for kind in _kinds(d.rng):
        d.families.append(f"{'held-out' if held_out else 'train'}/{kind}/{KINDS[kind][0](d)}")
    if d.rng.random() < 0.2:
        d.user(d.say("thanks"))
        d.assistant(d.say("welcome"))
    return d


def _kinds(rng: Random) -> list[str]:
    """The kinds of exchange in order: a greeting only in front and once, and at least one that concerns tools."""
    drawn = rng.choices(_NAMES, _WEIGHTS, k=rng.choice((1, 1, 1, 1, 2, 2, 2, 3, 3, 4)))
    kinds = [kind for kind in drawn if kind != "greeting"]
    if _TALK.issuperset(kinds):
        kinds.append(rng.choice(_USEFUL))
    return ["greeting", *kinds] if "greeting" in drawn else kinds


def _tools(d: Dialogue) -> list[dict[str, Any]]:
    """Definitions of every tool that was used and of up to five others, never of one that was said to be missing."""
    used, tools = list(d.offered), content().tools
    others = [name for name in tools if name not in d.offered and name not in d.denied]
    names = used + d.rng.sample(others, d.rng.randint(0 if used else 1, 5))
    d.rng.shuffle(names)
    return [tools[name].definition(d.rng) for name in names]


def _topics(d: Dialogue, count: int) -> list[Topic]:
    """`count` different topics by their weights, never of tables alone: their few rows would repeat a whole chat."""
    topics, chosen = content().topics, dict[str, Topic]()
    weights = [topic.weight for topic in topics]
    while not any(topic.draws.table is None for topic in chosen.values()):
        chosen.clear()
        while len(chosen) < count:
            (topic,) = d.rng.choices(topics, weights)
            chosen[topic.name] = topic
    return list(chosen.values())


def _talk_about(d: Dialogue, topic: Topic, frame: str, framed: float, fewest: int) -> None:
    """The first question of a topic, in a frame with probability `framed`, and `fewest` or more that follow."""
    slots = d.draw(topic.draws)
    chosen = [d.rng.random() < 0.6 for _ in topic.turns[1:]]
    later = topic.turns[1 : 1 + fewest] if sum(chosen) < fewest else itertools.compress(topic.turns[1:], chosen)
    for number, (ask, answer) in enumerate([topic.turns[0], *later]):
        question, reply = d.say(ask, slots), d.say(answer, slots)
        if number == 0 and d.rng.random() < framed:
            question = d.say(frame, ask=question)
        d.user(question)
        d.assistant(reply)
