"""The generator of tool-use conversations: determinism, schemas, consistency of results, variety, disjoint splits."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qwenscope.corpus.tool_use import (
    conversation_families,
    generate_tool_use,
    tool_use_conversation,
    write_tool_use,
)
from qwenscope.corpus.tool_use.dialogue import Dialogue
from qwenscope.corpus.tool_use.exchanges import KINDS
from qwenscope.corpus.tool_use.schema import Wording
from qwenscope.corpus.tool_use.schema import content as read_content
from qwenscope.errors import CorpusError

CONTENT = read_content()
TOOLS, TASKS, CHAINS = CONTENT.tools, CONTENT.tasks, CONTENT.chains
SPLITS = pytest.mark.parametrize("held_out", [False, True], ids=["train", "held-out"])
FIRST_FIVE = {
    "web_search": {"query"},
    "code_execute": {"code"},
    "ask_user": {"question"},
    "file_read": {"path"},
    "file_write": {"path", "content"},
}


@pytest.fixture(scope="module")
def drawn() -> dict[bool, list[dict[str, Any]]]:
    return {held_out: list(generate_tool_use(5000, 11, held_out=held_out)) for held_out in (False, True)}


def calls_with_results(conversation: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """(name, arguments, content) of every call; fails unless tool messages answer the calls one by one, in order."""
    found = []
    messages = conversation["messages"]
    for position, message in enumerate(messages):
        calls = message.get("tool_calls", [])
        for offset, call in enumerate(calls):
            answer = messages[position + 1 + offset]
            assert answer["role"] == "tool"
            assert answer["name"] == call["function"]["name"]
            found.append((answer["name"], call["function"]["arguments"], answer["content"]))
    assert len(found) == sum(message["role"] == "tool" for message in messages)
    return found


def violations(value: Any, schema: dict[str, Any]) -> list[str]:
    """What is wrong with `value` under the part of JSON schema that the tools use."""
    kinds = {"string": str, "integer": int, "number": (int, float), "array": list, "object": dict}
    kind = schema["type"]
    if not isinstance(value, kinds[kind]) or isinstance(value, bool):
        return [f"{value!r} is not of type {kind}"]
    if kind == "array":
        return [wrong for item in value for wrong in violations(item, schema["items"])]
    if kind == "object":
        missing = [f"{name} is missing" for name in schema["required"] if name not in value]
        unknown = [f"{name} is unknown" for name in value if name not in schema["properties"]]
        nested = [
            w for n, v in value.items() if n in schema["properties"] for w in violations(v, schema["properties"][n])
        ]
        return missing + unknown + nested
    return [f"{value!r} is none of {schema['enum']}"] if "enum" in schema and value not in schema["enum"] else []


def expansions(skeleton: str) -> set[str]:
    """Every choice of alternatives of a skeleton, without slots, case and punctuation."""
    parts = re.split(r"\[([^\[\]]*\|[^\[\]]*)\]", skeleton)
    choices = [part.split("|") if number % 2 else [part] for number, part in enumerate(parts)]
    return {re.sub(r"\{\w+\}|[^a-z0-9]+", " ", "".join(c).lower()).strip() for c in itertools.product(*choices)}


@SPLITS
def test_a_conversation_is_a_function_of_seed_index_and_split(held_out: bool) -> None:
    whole = list(generate_tool_use(60, 5, held_out=held_out))
    assert whole[37:50] == list(generate_tool_use(13, 5, start=37, held_out=held_out))
    assert whole[59] == tool_use_conversation(5, 59, held_out=held_out)
    assert whole[0] != tool_use_conversation(6, 0, held_out=held_out)
    assert whole[0] != tool_use_conversation(5, 0, held_out=not held_out)


def test_hash_randomisation_and_the_global_generator_do_not_matter() -> None:
    program = (
        "import hashlib, json, random; from qwenscope.corpus.tool_use import generate_tool_use\n"
        "random.seed({0}); print(hashlib.sha256(json.dumps(list(generate_tool_use(200, 3))).encode()).hexdigest())"
    )
    here = hashlib.sha256(json.dumps(list(generate_tool_use(200, 3))).encode()).hexdigest()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program.format(seed)]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert output.strip() == here


def test_what_is_returned_may_be_changed_without_consequence() -> None:
    first = tool_use_conversation(1, 1)
    pristine = json.dumps(first)
    for tool in first["tools"]:
        tool["function"]["parameters"]["properties"].clear()
        tool["function"]["parameters"]["required"].clear()
    for message in first["messages"]:
        message["content"] = "changed"
        for call in message.get("tool_calls", []):
            call["function"]["arguments"].clear()
    assert json.dumps(tool_use_conversation(1, 1)) == pristine


@SPLITS
def test_messages_follow_the_schema_of_the_dataset(drawn: dict[bool, list[dict[str, Any]]], held_out: bool) -> None:
    for conversation in drawn[held_out]:
        messages = conversation["messages"]
        assert set(conversation) == {"messages", "tools"}
        assert messages[0]["role"] in ("system", "user")
        assert messages[-1]["role"] == "assistant"
        assert "tool_calls" not in messages[-1]
        for before, message in itertools.pairwise(messages):
            allowed = {
                "system": {"user"},
                "user": {"assistant"},
                "assistant": {"tool"} if "tool_calls" in before else {"user"},
                "tool": {"tool", "assistant"},
            }
            assert message["role"] in allowed[before["role"]]
        for message in messages:
            assert isinstance(message["content"], str)
            assert message["content"] or message.get("tool_calls")
            assert set(message) <= {"role", "content", "tool_calls", "name"}
            assert ("name" in message) == (message["role"] == "tool")
            assert all(call["type"] == "function" for call in message.get("tool_calls", []))
            assert not re.search(r"[{}|]|\[\D|=>", message["content"]) or message["role"] == "tool"


@SPLITS
def test_every_call_fits_the_json_schema_of_an_offered_tool(
    drawn: dict[bool, list[dict[str, Any]]], held_out: bool
) -> None:
    called = Counter()
    for conversation in drawn[held_out]:
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in conversation["tools"]}
        assert len(offered) == len(conversation["tools"]) >= 1
        for name, arguments, _ in calls_with_results(conversation):
            assert violations(arguments, offered[name]) == []
            called[name] += 1
    assert set(called) == set(TOOLS)


def test_the_schema_checker_sees_violations() -> None:
    schema = TOOLS["set_thermostat"].definition(Random(0))["function"]["parameters"]
    assert violations({"room": "attic", "temperature": 20.5}, schema) == []
    assert len(violations({"room": 3, "heat": 1}, schema)) == 3
    schema = TOOLS["control_light"].definition(Random(0))["function"]["parameters"]
    assert len(violations({"room": "attic", "state": "dim", "brightness": 1.5}, schema)) == 2


def test_there_are_a_few_dozen_tools_over_eight_domains_or_more() -> None:
    assert len(TOOLS) >= 36
    assert len({task.domain for task in TASKS}) >= 8
    assert {task.tool for task in TASKS} | {"ask_user"} == set(TOOLS)
    for name, parameters in FIRST_FIVE.items():
        assert set(TOOLS[name].properties) == set(TOOLS[name].required) == parameters
    for chain in CHAINS:
        assert set(chain.tools) <= set(TOOLS)


@SPLITS
def test_every_kind_of_exchange_occurs(held_out: bool) -> None:
    families = [conversation_families(2, index, held_out=held_out) for index in range(1500)]
    kinds = Counter(family.split("/")[1] for row in families for family in row)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) >= 30
    subjects = {family.split("/", 2)[2] for row in families for family in row}
    for chain in CHAINS:
        assert chain.name in subjects
        assert (f"{chain.name}-stopped" in subjects) == (chain.stop is not None)
    assert any(subject.endswith("-given-up") for subject in subjects)
    assert any(subject.endswith("-withdrawn") for subject in subjects)


def test_families_name_their_split_and_the_splits_are_disjoint() -> None:
    train = {family for i in range(500) for family in conversation_families(4, i)}
    held_out = {family for i in range(500) for family in conversation_families(4, i, held_out=True)}
    assert all(family.startswith("train/") for family in train)
    assert all(family.startswith("held-out/") for family in held_out)


def wordings() -> Iterator[Wording]:
    """Every wording of the content."""
    yield from CONTENT.wordings.values()
    for task in TASKS:
        yield from (task.clauses, task.answers)
        if task.gap:
            yield from (task.gap.vague, task.gap.question)
    for chain in CHAINS:
        yield from (chain.clauses, chain.links, chain.answers)
        if chain.stop:
            yield chain.stop.answers
    for topic in CONTENT.topics:
        for turn in topic.turns:
            yield from turn


def test_no_skeleton_is_shared_between_the_splits() -> None:
    train = {sentence for words in wordings() for skeleton in words.train for sentence in expansions(skeleton)}
    held_out = {sentence for words in wordings() for skeleton in words.held_out for sentence in expansions(skeleton)}
    assert not (train & held_out) - {""}  # a line of slots alone
    assert len(train) > 1500
    assert len(held_out) > 700


def test_no_sentence_is_shared_between_the_splits(drawn: dict[bool, list[dict[str, Any]]]) -> None:
    def turns(held_out: bool) -> set[str]:
        return {m["content"] for c in drawn[held_out] for m in c["messages"] if m["role"] in ("system", "user")}

    assert not {turn for turn in turns(False) & turns(True) if " " in turn}


@SPLITS
def test_every_wording_can_be_filled_from_its_own_case(held_out: bool) -> None:
    d = Dialogue(Random(0), held_out)
    for task in TASKS:
        for _ in range(20):
            slots = d.sample(task).slots
            for words in (task.clauses, task.answers, *((task.gap.vague, task.gap.question) if task.gap else ())):
                for skeleton in words.of(held_out):
                    assert d.say(Wording((skeleton,), (skeleton,)), slots)
            assert task.gap is None or task.gap.slot in slots
    for chain in CHAINS:
        for _ in range(40):
            slots = d.draw(chain.draws)
            stopped = chain.stop is not None and d.evaluate(chain.stop.when, slots)
            ending = chain.stop.answers if stopped and chain.stop else chain.answers
            assert all(d.case(step, slots).content for step in chain.steps)
            for words in (chain.clauses, ending, chain.links):
                for skeleton in words.of(held_out):
                    assert d.say(Wording((skeleton,), (skeleton,)), slots)


@SPLITS
def test_results_agree_with_the_arguments(drawn: dict[bool, list[dict[str, Any]]], held_out: bool) -> None:
    checked: Counter[str] = Counter()
    for conversation in drawn[held_out]:
        for name, arguments, content in calls_with_results(conversation):
            if content.startswith(('{"error"', "Error:")):
                checked["error"] += 1
                continue
            if name == "code_execute":
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(arguments["code"], {})
                assert printed.getvalue().strip() == content
            elif name == "convert_currency":
                result = json.loads(content)
                assert result["converted"] == pytest.approx(arguments["amount"] * result["rate"], abs=0.006)
            elif name == "calculate_loan":
                owed, growth = float(arguments["principal"]), 1 + arguments["annual_rate"] / 1200
                for _ in range(arguments["months"]):
                    owed = owed * growth - json.loads(content)["monthly"]
                assert abs(owed) < 0.01 * arguments["months"] * growth ** arguments["months"]
            elif name == "file_write":
                assert json.loads(content)["bytes"] == len(arguments["content"].encode())
            elif name == "describe_numbers":
                values, result = sorted(arguments["numbers"]), json.loads(content)
                middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
                assert (result["low"], result["high"], result["median"]) == (values[0], values[-1], middle)
                assert result["mean"] == pytest.approx(sum(values) / len(values), abs=0.006)
            elif name in ("get_weather", "find_contact", "track_order", "find_book", "get_balance"):
                echoed = {
                    "get_weather": "city",
                    "find_contact": "name",
                    "track_order": "order_id",
                    "find_book": "title",
                }
                key = echoed.get(name, "account")
                assert json.loads(content)[key] == arguments[key]
            else:
                continue
            checked[name] += 1
    assert len(checked) == 11
    assert min(checked.values()) >= 20


@SPLITS
def test_answers_quote_only_identifiers_and_amounts_that_came_before(
    drawn: dict[bool, list[dict[str, Any]]], held_out: bool
) -> None:
    quoted = 0
    for conversation in drawn[held_out]:
        before = ""
        for message in conversation["messages"]:
            if message["role"] == "assistant":
                found = re.findall(r"\b(?:ORD|EV|MSG|TCK|RET|TX|T|R)-\d{5}\b|\b\d+\.\d+\b", message["content"])
                quoted += len(found)
                assert all(value in before for value in found)
            before += message["content"] + json.dumps(message.get("tool_calls", []))
    assert quoted > 2000


@SPLITS
def test_addresses_are_documentation_ones(drawn: dict[bool, list[dict[str, Any]]], held_out: bool) -> None:
    text = json.dumps(drawn[held_out])
    assert all(domain.startswith("example.") for domain in re.findall(r"@([\w.]+\w)", text))
    hosts = re.findall(r"https?://([^/\"\s\\]+)", text)
    assert hosts
    assert all(re.search(r"(^|\.)example\.(com|org|net)$", host) for host in hosts)
    addresses = re.findall(r"\b\d{1,3}(?:\.\d{1,3}){3}\b", text)
    assert addresses
    assert all(address.startswith(("192.0.2.", "198.51.100.", "203.0.113.")) for address in addresses)
    assert all(number.startswith("555-01") for number in re.findall(r"\b\d{3}-\d{4}\b", text))


@SPLITS
def test_nothing_is_called_that_was_said_to_be_missing_or_was_declined(held_out: bool) -> None:
    for index in range(1500):
        families = conversation_families(9, index, held_out=held_out)
        conversation = tool_use_conversation(9, index, held_out=held_out)
        offered = {tool["function"]["name"] for tool in conversation["tools"]}
        missing = {family.split("/")[2] for family in families if family.split("/")[1] == "no_tool"}
        assert not missing & offered
        if all(family.split("/")[1] in ("unsafe", "no_tool", "knowledge", "greeting") for family in families):
            assert not calls_with_results(conversation)


@SPLITS
def test_under_one_percent_of_5000_are_duplicates(drawn: dict[bool, list[dict[str, Any]]], held_out: bool) -> None:
    distinct = {json.dumps(conversation["messages"]) for conversation in drawn[held_out]}
    assert len(distinct) >= 0.99 * 5000


@pytest.mark.slow
@SPLITS
def test_under_one_percent_of_50000_are_duplicates(held_out: bool) -> None:
    distinct = {
        hashlib.sha256(json.dumps(conversation["messages"]).encode()).digest()
        for conversation in generate_tool_use(50_000, 42, held_out=held_out)
    }
    assert len(distinct) >= 0.99 * 50_000


def test_train_and_held_out_share_no_conversation(drawn: dict[bool, list[dict[str, Any]]]) -> None:
    train, held_out = ({json.dumps(c["messages"]) for c in drawn[split]} for split in (False, True))
    assert not train & held_out


@SPLITS
def test_the_tool_list_varies_in_choice_and_order(drawn: dict[bool, list[dict[str, Any]]], held_out: bool) -> None:
    lists = Counter(tuple(t["function"]["name"] for t in conversation["tools"]) for conversation in drawn[held_out])
    assert len(lists) > 0.8 * 5000
    first = Counter(names[0] for names in lists)
    assert max(first.values()) < 0.1 * len(lists)
    by_choice = Counter(frozenset(names) for names in lists)
    assert max(by_choice.values()) > 1  # the same tools do occur in several orders


def test_all_conversations_render_in_the_real_template_without_losing_a_call(
    shared_data: Path, drawn: dict[bool, list[dict[str, Any]]]
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "mini8k_qwen3.5-template")
    for conversation in drawn[False][:600] + drawn[True][:300]:
        text = tokenizer.apply_chat_template(conversation["messages"], tools=conversation["tools"], tokenize=False)
        calls = calls_with_results(conversation)
        body = text.partition("<|im_end|>")[2]
        assert body.count("<tool_call>") == body.count("<tool_response>") == len(calls)
        for name, arguments, content in calls:
            assert f"<function={name}>" in body
            assert content.strip() in body
            assert all(f"<parameter={key}>" in body for key in arguments)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_write_gives_the_conversations_line_by_line_and_the_same_bytes_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_tool_use(path, 30, 8, held_out=True)
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode()
    assert [json.loads(line) for line in text.splitlines()] == list(generate_tool_use(30, 8, held_out=True))
    write_tool_use(path, 30, 8, held_out=True)
    assert path.read_bytes() == raw
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_write_refuses_what_it_cannot_do_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="at least 1"):
        write_tool_use(tmp_path / "a.jsonl", 0, 1)
    with pytest.raises(CorpusError, match=r"a\.txt must end in \.jsonl"):
        write_tool_use(tmp_path / "a.txt", 3, 1)
    with pytest.raises(CorpusError, match="missing does not exist"):
        write_tool_use(tmp_path / "missing" / "a.jsonl", 3, 1)
    assert not list(tmp_path.iterdir())
