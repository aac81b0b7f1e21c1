"""Repairs lose nothing; what cannot be repaired has a name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwenscope.corpus.repair import Dropped, clean, conversation_id, parse_json, split_of

USER = {"role": "user", "content": "hi"}


def test_string_arguments_become_mappings_with_their_values() -> None:
    arguments = {"x": 0.1, "big": 12345678901234567890, "nested": {"list": [1, None, "é"]}}
    flat = {"name": "f", "arguments": json.dumps(arguments)}
    messages, _ = clean([USER, {"role": "assistant", "content": None, "tool_calls": [flat]}], None)
    assert messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    assert messages[1]["content"] == ""


@pytest.mark.parametrize("empty", [None, "", " ", {}])
def test_a_call_without_arguments_has_none(empty: Any) -> None:
    call = {"id": "c1", "function": {"name": "f", "arguments": empty}}
    messages, _ = clean([USER, {"role": "assistant", "tool_calls": [call]}], None)
    assert messages[1]["tool_calls"] == [{"type": "function", "id": "c1", "function": {"name": "f", "arguments": {}}}]


def test_leading_system_messages_merge_and_empty_ones_vanish() -> None:
    system = [
        {"role": role, "content": text} for role, text in (("system", "one"), ("system", " "), ("developer", "two"))
    ]
    messages, _ = clean([*system, USER], None)
    assert messages == [{"role": "system", "content": "one\n\ntwo"}, USER]


def test_parts_are_joined_and_old_names_translated() -> None:
    parts = [{"type": "text", "text": "a"}, {"text": "b"}]
    messages, _ = clean([{"role": "user", "content": parts}, {"role": "function", "name": "f", "content": ""}], None)
    assert messages == [{"role": "user", "content": "ab"}, {"role": "tool", "content": "", "name": "f"}]


def test_tools_may_be_json_text() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": 0.30000000000000004}}}
    assert clean([USER], json.dumps([tool]))[1] == [tool]
    assert clean([USER], [])[1] is clean([USER], "")[1] is clean([USER], None)[1] is None


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        (None, None, "malformed_messages"),
        ([], None, "malformed_messages"),
        ("hello", None, "malformed_messages"),
        (["hello"], None, "malformed_messages"),
        ([{"role": "narrator", "content": "x"}], None, "unknown_role"),
        ([{"content": "x"}], None, "unknown_role"),
        ([{"role": ["user"], "content": "x"}], None, "unknown_role"),
        ([{"role": "user", "content": None}], None, "empty_message"),
        ([{"role": "assistant", "content": " \n"}], None, "empty_message"),
        ([{"role": "system", "content": ""}], None, "empty_message"),
        ([{"role": "user", "content": 3}], None, "non_text_content"),
        ([{"role": "user", "content": [{"type": "image", "url": "u"}]}], None, "non_text_content"),
        ([{"role": "assistant", "content": "", "tool_calls": "f()"}], None, "malformed_tool_call"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {}}}]}],
            None,
            "malformed_tool_call",
        ),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x: 1}"}]}], None, "malformed_arguments"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}], None, "malformed_arguments"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": NaN}'}]}],
            None,
            "malformed_arguments",
        ),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[" * 10**5}]}], None, "malformed_arguments"),
        ([USER], "not json", "malformed_tools"),
        ([USER], {"name": "f"}, "malformed_tools"),
        ([USER], ["f"], "malformed_tools"),
    ],
)
def test_drops_have_reasons(messages: Any, tools: Any, reason: str) -> None:
    with pytest.raises(Dropped) as drop:
        clean(messages, tools)
    assert drop.value.reason == reason


def test_ids_follow_the_content_alone() -> None:
    same = [{"content": "hi", "role": "user"}]
    assert conversation_id([USER], None) == conversation_id(same, None)
    assert (
        len({conversation_id([USER], None), conversation_id([USER], [{"a": 1}]), conversation_id([USER, USER], None)})
        == 3
    )
    with pytest.raises(Dropped, match="not_json"):
        conversation_id([{"role": "assistant", "tool_calls": float("nan")}], None)


def test_split_follows_tools() -> None:
    call = {"role": "assistant", "tool_calls": [{}]}
    assert [split_of([USER], None), split_of([USER], [{}]), split_of([call], None)] == ["chat", "tool_use", "tool_use"]


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "[" * 10**5, "{", b"\xff", "1" * 5000])
def test_json_is_strict(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)
