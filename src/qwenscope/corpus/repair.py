"""Rows as they come, made into messages a chat template can take: repaired where nothing is lost, else dropped.

A message is {role, content, reasoning_content?, tool_calls?, name?, tool_call_id?}; a tool call is
{type, id?, function: {name, arguments: mapping}}. Every drop has a reason, which the stream counts.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn

Message = dict[str, Any]

_ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",  # OpenAI's older name
}


class Dropped(Exception):  # noqa: N818 - an outcome that is counted, not an error
    """A conversation is left out of the corpus: `reason` is counted, `country` says which one if it is why."""

    def __init__(self, reason: str, country: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.country = country


def parse_json(text: str | bytes) -> Any:
    """Strict JSON: NaN and Infinity are refused, so that whatever was read can be written again.

    Raises:
        ValueError: not JSON (also when it is nested beyond what the interpreter can hold).
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def clean(messages: Any, tools: Any) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Repair a row's `messages` and `tools`.

    Lossless repairs: string arguments become mappings, flat tool calls get their `function` level, text parts are
    joined, leading system messages are merged, empty system messages vanish, `developer` and `function` get today's
    names, `tools` given as JSON text are parsed.

    Raises:
        Dropped: malformed_messages, unknown_role, non_text_content, empty_message, malformed_tool_call,
            malformed_arguments, malformed_tools.
    """
    if not isinstance(messages, list) or not messages:
        raise Dropped("malformed_messages")
    cleaned = [_message(message) for message in messages]
    cleaned = [message for message in cleaned if message["role"] != "system" or message["content"].strip()]
    leading = next((i for i, message in enumerate(cleaned) if message["role"] != "system"), len(cleaned))
    if leading > 1:
        merged = "\n\n".join(message["content"] for message in cleaned[:leading])
        cleaned[:leading] = [{"role": "system", "content": merged}]
    if not cleaned:
        raise Dropped("empty_message")
    return cleaned, _tools(tools)


def conversation_id(messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
    """16 hex digits of the content's hash: the same in every run and under every tokenizer.

    Raises:
        Dropped: not_json, for arguments or tools that hold values JSON cannot; lone_surrogate.
    """
    try:
        text = json.dumps([messages, tools], sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):  # values that only parquet can hold: NaN, bytes, timestamps
        raise Dropped("not_json") from None
    return document_id(text)


def document_id(text: str) -> str:
    """16 hex digits of a document's hash, likewise.

    Raises:
        Dropped: lone_surrogate.
    """
    try:
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    except UnicodeEncodeError:
        raise Dropped("lone_surrogate") from None


def split_of(messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
    """`text` without messages, `tool_use` if there are tools or tool calls, else `chat`."""
    if not messages:
        return "text"
    return "tool_use" if tools or any(message.get("tool_calls") for message in messages) else "chat"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _message(message: Any) -> Message:
    if not isinstance(message, dict):
        raise Dropped("malformed_messages")
    given = message.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise Dropped("unknown_role")
    content = _content(message.get("content"))
    cleaned: Message = {"role": role, "content": content}
    if role == "assistant":
        reasoning = message.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning.strip():
            cleaned["reasoning_content"] = reasoning
        calls = message.get("tool_calls")
        if calls:
            if not isinstance(calls, list):
                raise Dropped("malformed_tool_call")
            cleaned["tool_calls"] = [_tool_call(call) for call in calls]
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            cleaned[key] = message[key]
    carries_more = role in ("system", "tool") or len(cleaned.keys() & {"reasoning_content", "tool_calls"}) > 0
    if not content.strip() and not carries_more:
        raise Dropped("empty_message")
    return cleaned


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(map(_is_text_part, content)):
        return "".join(part["text"] for part in content)
    raise Dropped("non_text_content")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise Dropped("malformed_tool_call")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except ValueError:
            raise Dropped("malformed_arguments") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise Dropped("malformed_arguments")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **identity, "function": {"name": function["name"], "arguments": arguments}}


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        try:
            tools = parse_json(tools) if tools.strip() else None
        except ValueError:
            raise Dropped("malformed_tools") from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise Dropped("malformed_tools")
    return tools
