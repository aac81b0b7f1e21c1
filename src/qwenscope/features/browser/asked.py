"""What requests ask the language model for, checked before it is loaded; each error names the field at fault."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any, TypeGuard, get_args

from qwenscope.errors import FormatError
from qwenscope.features.continuation import Sampling
from qwenscope.features.steering import Mode
from qwenscope.features.store import Index

MAX_CHARACTERS = 8000
"""Of one text."""
MAX_CONVERSATION = 40_000
"""Of a conversation's JSON, tools included."""
MAX_NEW_TOKENS = 200
MAX_PUSHES = 8
MAX_LATENTS = 256
"""Whose output scores are asked for at once."""
_CHAT_ROLES = ("system", "user", "assistant", "tool")
_WORDS = {"mode": get_args(Mode), "where": ("answer", "all", "prefill", "decode"), "unit": ("max", "norm")}


@dataclass(frozen=True)
class Given:
    """What is to be read or written on."""

    content: str | list[dict[str, Any]]
    """Plain text, or messages."""
    tools: list[dict[str, Any]] | None = None


def given_in(asked: dict[str, Any], text: str) -> Given:
    """The text under the key `text`, or the conversation under `messages` and `tools`.

    Raises:
        FormatError: both or neither, one that is empty or too long, a turn that is none, a role that is none.
    """
    messages, tools = asked.get("messages"), asked.get("tools")
    if messages is None:
        return Given(checked_length(asked.get(text)))
    if asked.get(text) is not None:
        raise FormatError(f"give {text} or messages, not both")
    if not isinstance(messages, list) or not messages:
        raise FormatError("messages is a list of at least one turn, {role, content}")
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _CHAT_ROLES:
            raise FormatError(f"turn {number} has the role {role!r}; a role is {', '.join(_CHAT_ROLES)}")
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise FormatError("tools is a list of objects, each the schema of a tool")
    length = len(json.dumps([messages, tools], ensure_ascii=False))
    if length > MAX_CONVERSATION:
        raise FormatError(f"a conversation has at most {MAX_CONVERSATION:,} characters with its tools, not {length:,}")
    return Given(messages, tools)


def checked_length(text: Any) -> str:
    """`text` itself.

    Raises:
        FormatError: it is none, blank or too long.
    """
    if not isinstance(text, str) or not text.strip():
        raise FormatError("there is no text to run")
    if len(text) > MAX_CHARACTERS:
        raise FormatError(f"a text has at most {MAX_CHARACTERS:,} characters, not {len(text):,}")
    return text


def token_count(asked: dict[str, Any], default: int) -> int:
    """How many tokens are to be written.

    Raises:
        FormatError: no number, or out of range.
    """
    count = asked.get("tokens", default)
    if not is_int(count) or not 1 <= count <= MAX_NEW_TOKENS:
        raise FormatError(f"tokens is a number between 1 and {MAX_NEW_TOKENS}")
    return count


def sampling_in(asked: dict[str, Any]) -> Sampling:
    """How tokens are to be drawn.

    Raises:
        FormatError: temperature, top_p or seed is no number or out of range.
    """
    temperature, top_p, seed = asked.get("temperature", 0), asked.get("top_p", 1), asked.get("seed", 0)
    if not (is_number(temperature) and is_number(top_p) and is_int(seed)):
        raise FormatError("temperature, top_p and seed are numbers, seed a whole one")
    return Sampling(float(temperature), float(top_p), abs(seed) % (1 << 31))


def latent_in(asked: dict[str, Any], index: Index) -> tuple[str, int]:
    """The SAE and the latent that are asked for.

    Raises:
        FormatError: none is named; MissingLatentError: the index has none such.
    """
    sae_id, latent = asked.get("sae"), asked.get("latent")
    if not isinstance(sae_id, str) or not is_int(latent):
        raise FormatError(f"there is no latent {latent} of {sae_id}")
    index.check(sae_id, latent)
    return sae_id, latent


def latents_in(asked: dict[str, Any], index: Index) -> tuple[str, list[int]]:
    """The SAE and the latents that are asked for.

    Raises:
        FormatError: none, or too many; MissingLatentError: the index has none such.
    """
    sae_id, latents = asked.get("sae"), asked.get("latents")
    if not isinstance(latents, list) or not 1 <= len(latents) <= MAX_LATENTS:
        raise FormatError(f"latents is a list of 1 to {MAX_LATENTS} numbers")
    for latent in latents:
        latent_in({"sae": sae_id, "latent": latent}, index)
    return str(sae_id), latents


def pushes_in(asked: dict[str, Any], index: Index) -> list[dict[str, Any]]:
    """What is to act together.

    Raises:
        FormatError: none, too many, or one whose value is missing, of the wrong type or out of range.
    """
    pushes = asked.get("pushes")
    if not isinstance(pushes, list) or not 1 <= len(pushes) <= MAX_PUSHES:
        raise FormatError(f"pushes is a list of 1 to {MAX_PUSHES} latents")
    for push in pushes:
        check_push(push, index)
    return pushes


def check_push(push: Any, index: Index) -> None:
    """Raises FormatError unless `push` is one latent's, as `steer` takes it."""
    if not isinstance(push, dict):
        raise FormatError("a push is an object with sae, latent, strength, mode, unit and where")
    latent_in(push, index)
    strength = push.get("strength")
    if not isinstance(strength, int | float) or isinstance(strength, bool) or not abs(strength) <= 1000:
        raise FormatError("strength is a number between -1000 and 1000")
    for name, words in _WORDS.items():
        if push.get(name) not in words:
            raise FormatError(f"{name} is {', '.join(words[:-1])} or {words[-1]}, not {push.get(name)!r}")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number that a float can hold, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_int(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)
