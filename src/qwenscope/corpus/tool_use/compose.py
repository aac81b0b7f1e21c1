"""One conversation: an optional system prompt, one to four exchanges, an optional farewell, and the tools offered."""

from __future__ import annotations

from random import Random
from typing import Any

from qwenscope.corpus.tool_use import talk
from qwenscope.corpus.tool_use.dialogues import KINDS, Dialogue
from qwenscope.corpus.tool_use.model import TOOLS

_NAMES, _WEIGHTS = tuple(KINDS), tuple(weight for _, weight in KINDS.values())
_CHAT = frozenset({"knowledge", "greeting", "unsafe"})
_USEFUL = ("single", "parallel", "steps", "clarify")


def compose(rng: Random, held_out: bool) -> tuple[Dialogue, list[dict[str, Any]]]:
    """Draw one conversation: the dialogue, and the definitions of its tools in shuffled order."""
    d = Dialogue(rng, held_out)
    if rng.random() < 0.6:
        rules = [d.say(talk.RULES) for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))]
        d.messages.append({"role": "system", "content": " ".join([d.say(talk.SYSTEM), *dict.fromkeys(rules)])})
    split = "held-out" if held_out else "train"
    for kind in _kinds(rng):
        d.families.append(f"{split}/{kind}/{KINDS[kind][0](d)}")
    if rng.random() < 0.2:
        d.user(d.say(talk.THANKS))
        d.assistant(d.say(talk.WELCOME))
    return d, _tools(d)


def _kinds(rng: Random) -> list[str]:
    """The kinds of exchange in order: a greeting only in front and once, and at least one that concerns tools."""
    drawn = rng.choices(_NAMES, _WEIGHTS, k=rng.choice((1, 1, 1, 1, 2, 2, 2, 3, 3, 4)))
    kinds = [kind for kind in drawn if kind != "greeting"]
    if _CHAT.issuperset(kinds):
        kinds.append(rng.choice(_USEFUL))
    return ["greeting", *kinds] if "greeting" in drawn else kinds


def _tools(d: Dialogue) -> list[dict[str, Any]]:
    """Definitions of every tool that was used and of up to five others, never of one that was said to be missing."""
    used = list(d.offered)
    others = [name for name in TOOLS if name not in d.offered and name not in d.denied]
    names = used + d.rng.sample(others, d.rng.randint(0 if used else 1, 5))
    d.rng.shuffle(names)
    return [TOOLS[name].definition(d.rng) for name in names]
