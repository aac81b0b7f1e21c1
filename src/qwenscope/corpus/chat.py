"""Conversations through a tokenizer's own chat template: text, token ids, and which role each token plays.

Roles are found without knowing the template. The content strings are looked for in the rendered text, in order, from
the front and from the back: where both agree there is only one way to place them. Otherwise the conversation is
rendered once more with every string between two noncharacters (U+FDD0 + role ... U+FDDF), which a template passes
through like any text; without them it must be the plain rendering, and then they stand exactly where each role begins
and ends.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from qwenscope.corpus.conversation import ROLES, Rendered, Roles
from qwenscope.corpus.repair import Dropped, Message, clean
from qwenscope.corpus.tokens import MOST_CHARACTERS, encoder_for
from qwenscope.errors import CorpusError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER, _ASSISTANT, _TOOL_CALL, _TOOL_RESULT, _THINK, _TEMPLATE, _ = range(len(ROLES))
_CODES = {"system": _SYSTEM, "user": _USER, "assistant": _ASSISTANT, "tool": _TOOL_RESULT}
_DATE = """
d=26 -d=26 e=26 b=Jul B=July m=07 -m=7 Y=2024 y=24 a=Fri A=Friday j=208 H=00 I=12 M=00 S=00 p=AM F=2024-07-26 T=00:00:00
"""
_REPLACED = "".join(".replace('%{}', '{}')".format(*each.split("=")) for each in _DATE.split())
_TODAY = "{%- macro strftime_now(form) -%}{{ form" + _REPLACED + " }}{%- endmacro -%}"
"""Goes before a template that asks for today's date, so that a run is the same on any day; Llama 3.1's own default."""
_MOST_MESSAGES = 10_000
_MOST_OBJECTS = 10_000  # of JSON that are looked at in one rendered text
_OPEN, _CLOSE = 0xFDD0, chr(0xFDDF)
_MARKERS = re.compile("([\ufdd0-\ufddf])")


def render(messages: Any, tools: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Rendered:
    """Repair and render one conversation; for many, `Renderer` tokenises in batches.

    Raises:
        Dropped: malformed beyond lossless repair, or refused by the template.
        CorpusError: the tokenizer has no chat template or is not a fast one.
    """
    renderer = Renderer(tokenizer, max_length)
    return renderer.encode([renderer.layout(*clean(messages, tools))])[0]


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | dict[str, str] | None) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or one that renders conversations by another template."""
    if template is None:
        return tokenizer
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def on_one_day(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or one for whose templates today is always the same day."""
    template: Any = getattr(tokenizer, "chat_template", None)
    if "strftime_now" not in str(template):
        return tokenizer
    named = isinstance(template, dict)
    return with_template(tokenizer, {n: _TODAY + str(t) for n, t in template.items()} if named else _TODAY + template)


@dataclass(frozen=True, slots=True)
class Layout:
    """A conversation as text, before the tokenizer."""

    text: str
    roles: Roles
    """[characters], codes of ROLES."""
    messages: list[Message]
    tools: list[dict[str, Any]] | None


class Renderer:
    """Renders conversations with one tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        """Raises CorpusError if the tokenizer is not a fast one."""
        self.tokenizer = on_one_day(tokenizer)
        self.max_length = max_length
        self.encoder = encoder_for(tokenizer)

    def check_template(self) -> None:
        """Raises CorpusError if the tokenizer has no chat template, or several without a default."""
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise CorpusError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template, which conversations need: name "
                "one with corpus.chat_template, take a chat model's, or give rows with text"
            )
        if isinstance(template, dict) and "default" not in template:
            raise CorpusError(
                f"the tokenizer of {self.tokenizer.name_or_path} has the chat templates {', '.join(sorted(template))} "
                "and none named default; name one of them so in its tokenizer_config.json"
            )

    def layout(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> Layout:
        """Render cleaned messages to text with a role for each character.

        Raises:
            Dropped: the template refuses, the text cannot be encoded, or is too long to be looked at.
            CorpusError: there is no template.
        """
        self.check_template()
        if len(messages) > _MOST_MESSAGES or sum(len(message["content"]) for message in messages) > MOST_CHARACTERS:
            raise Dropped("too_long")
        text = self._apply(messages, tools)
        if len(text) > MOST_CHARACTERS:
            raise Dropped("too_long")
        if not text.isascii():
            _check_characters(text)
            normalise = self.encoder.normalise
            if normalise is not None and normalise(text) != text:  # the tokenizer would do it unseen
                try:
                    messages, tools = _map_strings(normalise, messages), _map_strings(normalise, tools)
                except RecursionError:
                    raise Dropped("not_json") from None
                text = self._apply(messages, tools)
        roles = self._character_roles(text, messages, tools)
        return Layout(text, roles, messages, tools)

    def encode(self, layouts: Sequence[Layout]) -> list[Rendered]:
        """Tokenise, truncate and carry roles from characters to tokens."""
        encoded = self.encoder([layout.text for layout in layouts])
        return [self._rendered(layout, *found) for layout, found in zip(layouts, encoded, strict=True)]

    def _apply(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tools=list(tools or ()) or None, tokenize=False))
        except TemplateError as error:
            raise Dropped(f"template: {reason(error, 80)}") from None
        except MemoryError:
            raise
        except Exception as error:  # a template is a program, and may fail like one; its words may hold the content
            raise Dropped(f"template: {type(error).__name__}") from None

    def _character_roles(self, text: str, messages: list[Message], tools: list[dict[str, Any]] | None) -> Roles:
        roles = np.full(len(text), _TEMPLATE, dtype=np.uint8)
        marked, cores = _mark(messages)
        starts = _only_placement(text, cores)
        pieces: list[str] = []
        if starts is None:
            with suppress(Dropped):  # a template that looks into the content may refuse the marks
                pieces = _MARKERS.split(self._apply(marked, tools))
            if "".join(pieces[::2]) == text:
                _fill_between_markers(roles, pieces)
            else:  # the template looks into the content and treats marked text differently
                starts = _first_placement(text, cores)
        if starts is not None:
            for start, (code, core) in zip(starts, cores, strict=True):
                if start >= 0:
                    roles[start : start + len(core)] = code
        for start, end in _tool_places(text, roles, tools or ()):
            roles[start:end] = _SYSTEM
        return roles

    def _rendered(self, layout: Layout, ids: NDArray[np.int32], starts: NDArray[np.int64]) -> Rendered:
        roles = layout.roles[starts]
        # What the template writes around a call's name, up to the next special token, belongs to the call. The name may
        # begin inside a token ("=sum"), so the tokens that hold it are found by its characters.
        is_added = self.encoder.is_added_V[ids]
        run = np.cumsum(is_added)
        has_call = np.zeros(len(ids) + 1, dtype=bool)
        names = np.flatnonzero(layout.roles == _TOOL_CALL)
        has_call[run[np.searchsorted(starts, names, side="right") - 1]] = True
        roles[(roles == _TEMPLATE) & has_call[run] & ~is_added] = _TOOL_CALL
        kept = slice(self.max_length)
        truncated = len(ids) > self.max_length
        return Rendered(ids[kept], roles[kept], truncated, layout.text, layout.messages, layout.tools)


def _tool_places(text: str, roles: Roles, tools: Sequence[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    """(start, end) of each tool's schema: as transformers' tojson writes it by default, else any JSON of its value.

    Raises:
        Dropped: not_json.
    """
    end = 0
    objects: list[tuple[int, int, Any]] | None = None
    for tool in tools:
        try:
            schema = json.dumps(tool, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            raise Dropped("not_json") from None
        start = text.find(schema, end)
        place = (start, start + len(schema)) if start >= 0 else None
        if place is None:
            objects = _objects(text, roles) if objects is None else objects
            wanted = (tool, tool.get("function", tool))
            place = next(((first, last) for first, last, value in objects if first >= end and value in wanted), None)
        if place is not None:
            end = place[1]
            yield place


def _objects(text: str, roles: Roles) -> list[tuple[int, int, Any]]:
    """(start, end, value) of the JSON objects that the template wrote, nested ones too."""
    decoder = json.JSONDecoder()
    objects = []
    braces = (match.start() for match in re.finditer(r"\{", text) if roles[match.start()] == _TEMPLATE)
    for start in islice(braces, _MOST_OBJECTS):
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        objects.append((start, end, value))
    return objects


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Dropped("lone_surrogate") from None
    if _MARKERS.search(text):
        raise Dropped("noncharacter")


def _map_strings(function: Callable[[str], str], value: Any) -> Any:
    """The same JSON value with `function` applied to each string, keys included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [_map_strings(function, item) for item in value]
    if isinstance(value, dict):
        return {_map_strings(function, key): _map_strings(function, item) for key, item in value.items()}
    return value


def _mark(messages: Iterable[Message]) -> tuple[list[Message], list[tuple[int, str]]]:
    """Messages with marked strings, and the strings with their role codes in the order they are rendered."""
    cores: list[tuple[int, str]] = []

    def mark(text: str, code: int) -> str:
        core = text.strip()  # templates trim: whitespace stays outside
        if not core:
            return text
        cores.append((code, core))
        before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
        return f"{before}{chr(_OPEN + code)}{core}{_CLOSE}{after}"

    marked = []
    for message in messages:
        copy = dict(message)
        content = message["content"]
        if "reasoning_content" in message:
            copy["reasoning_content"] = mark(message["reasoning_content"], _THINK)
        elif message["role"] == "assistant" and "</think>" in content:
            head, close, content = content.rpartition("</think>")
            before, opening, reasoning = head.rpartition("<think>")
            head = f"{before}{opening}{mark(reasoning, _THINK)}{close}"
            copy["content"] = head + mark(content, _ASSISTANT)
            content = ""
        if content:
            copy["content"] = mark(content, _CODES[message["role"]])
        if "tool_calls" in message:
            copy["tool_calls"] = [
                {**call, "function": {**call["function"], "name": mark(call["function"]["name"], _TOOL_CALL)}}
                for call in message["tool_calls"]
            ]
        marked.append(copy)
    return marked, cores


def _fill_between_markers(roles: Roles, pieces: list[str]) -> None:
    """`pieces` alternate between text and single markers."""
    position, code = 0, _TEMPLATE
    for text, marker in zip(pieces[::2], [*pieces[1::2], _CLOSE], strict=True):
        if code != _TEMPLATE:
            roles[position : position + len(text)] = code
        position += len(text)
        code = _TEMPLATE if marker == _CLOSE else ord(marker) - _OPEN


def _first_placement(text: str, cores: list[tuple[int, str]]) -> list[int]:
    """Where each string is found first after the one before it, -1 if it is not."""
    starts, end = [], 0
    for _, core in cores:
        start = text.find(core, end)
        starts.append(start)
        end = max(end, start + len(core) if start >= 0 else end)
    return starts


def _only_placement(text: str, cores: list[tuple[int, str]]) -> list[int] | None:
    """`_first_placement` if it is the only one possible; None also with reasoning, which templates may leave out."""
    starts, end = _first_placement(text, cores), len(text)
    for start, (code, core) in zip(reversed(starts), reversed(cores), strict=True):
        if start < 0 or code == _THINK or text.rfind(core, 0, end) != start:
            return None
        end = start
    return starts
