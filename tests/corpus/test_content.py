"""The content files: errors name file and key, and the chat that they make is varied, repeatable and well formed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwenscope.corpus.stream import CorpusStream
from qwenscope.corpus.tool_use import chat_conversation
from qwenscope.corpus.tool_use.schema import FOLDER, content
from qwenscope.errors import CorpusError
from qwenscope.recipe import CorpusRecipe, SourceRecipe

SPLITS = pytest.mark.parametrize("held_out", [False, True], ids=["train", "held-out"])


@pytest.fixture(scope="module")
def chats() -> dict[bool, list[dict[str, Any]]]:
    return {
        held_out: [chat_conversation(3, index, held_out=held_out) for index in range(1000)]
        for held_out in (False, True)
    }


@SPLITS
def test_chats_are_all_different_and_use_many_words(chats: dict[bool, list[dict[str, Any]]], held_out: bool) -> None:
    for seed in range(20):
        several = (chat_conversation(seed, index, held_out=held_out) for index in range(1000))
        assert len({json.dumps(chat) for chat in several}) == 1000
    words = [
        word
        for chat in chats[held_out]
        for message in chat["messages"]
        for word in re.findall(r"[\w']+", message["content"].lower())
    ]
    assert len(set(words)) > (1500 if held_out else 2500)
    lengths = sorted(len(json.dumps(chat)) for chat in chats[held_out])
    assert lengths[900] > 2 * lengths[100]


@SPLITS
def test_chats_are_turns_of_user_and_assistant(chats: dict[bool, list[dict[str, Any]]], held_out: bool) -> None:
    for chat in chats[held_out]:
        assert set(chat) == {"messages"}
        roles = [message["role"] for message in chat["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert len(turns) >= 4
        for message in chat["messages"]:
            assert message["content"] == message["content"].strip() != ""
            prose = re.sub(r"```.*?```|`[^`]*`|\{\".*\}|\$?\[.*?\]", "", message["content"], flags=re.DOTALL)
            assert "{" not in prose
            assert "|" not in prose


def test_no_turn_of_a_chat_is_in_both_splits(chats: dict[bool, list[dict[str, Any]]]) -> None:
    train, held_out = (
        {m["content"] for chat in chats[split] for m in chat["messages"] if " " in m["content"]}
        for split in (False, True)
    )
    assert not train & held_out


def test_chats_do_not_depend_on_the_hash_seed() -> None:
    program = (
        "import hashlib, json; from qwenscope.corpus.tool_use import chat_conversation\n"
        "print(hashlib.sha256(json.dumps([chat_conversation(1, i) for i in range(100)]).encode()).hexdigest())"
    )
    here = hashlib.sha256(json.dumps([chat_conversation(1, index) for index in range(100)]).encode()).hexdigest()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == here


def test_sums_products_and_shares_are_right(chats: dict[bool, list[dict[str, Any]]]) -> None:
    checked = 0
    text = "\n".join(m["content"] for split in chats.values() for chat in split for m in chat["messages"])
    for pattern, check in {
        r"\b(\d+) (?:x|times) (\d+) (?:=|is) (\d+)": lambda a, b, c: a * b == c,
        r"\b(\d+) % of (\d+) is (\d+(?:\.\d+)?)\b": lambda a, b, c: abs(a * b - 100 * c) < 1e-6,
        r"(?<!times )\b(\d+) divided by (\d+) is (\d+)[.,]": lambda a, b, c: a == b * c,
        r"((?<!\d)-?\d+) °C is (-?\d+(?:\.\d+)?) °F()": lambda c, f, _: abs(f - (c * 9 / 5 + 32)) < 1e-6,
    }.items():
        for found in re.findall(pattern, text):
            assert check(*(float(number or 0) for number in found)), found
            checked += 1
    assert checked > 60


def test_code_of_the_chats_compiles_and_passes_its_own_check() -> None:
    table = content().topics[[topic.name for topic in content().topics].index("function")].draws.table
    assert table is not None
    for row in (*table.train, *table.held_out):
        exec(f"{row['code']}\n{row['test']}", {})


def test_the_chat_source_streams_conversations_of_the_split_chat(qwen_tokenizer: Any) -> None:
    recipe = CorpusRecipe(sources=(SourceRecipe(name="chat", weight=1),))
    conversations = list(itertools.islice(CorpusStream(recipe, qwen_tokenizer, seed=4), 20))
    assert {(c.source, c.split) for c in conversations} == {("chat", "chat")}
    held_out = list(itertools.islice(CorpusStream(recipe, qwen_tokenizer, seed=4, held_out=True), 20))
    assert not {c.id for c in conversations} & {c.id for c in held_out}


WRONG = {
    "tables: {t: 'a | b\\n1 | 2'}": "x.yaml, tables.t: needs two lines or more",
    'tables: {t: "a | b\\n1 | 2\\n3"}': r"x.yaml, tables.t: the row '3' has 1 cells, the header 2",
    "pools: {p: 3}": "x.yaml, pools.p: a pool is a list",
    "topcs: {}": "x.yaml: unknown key 'topcs'",
    'topics: {t: {turns: [{ask: "a\\nb"}]}}': r"x.yaml, topics.t: key 'answer' is missing",
    'topics: {t: {turns: [{ask: "a {x}\\nb", answer: "c\\nd"}]}}': r"x.yaml, topics.t: 'a \{x\}' uses the slot x",
    "topics: {t: {draw: {x: 'open(1)'}, turns: []}}": r"x.yaml, topics.t: 'open\(1\)' uses open, which is neither",
    "topics: {t: {draw: {x: '1 +'}, turns: []}}": r"x.yaml, topics.t: '1 \+' is no expression",
    "topics: {t: {draw: {pick: 1}, turns: []}}": "x.yaml, topics.t: the slot pick has the name of a function",
    "topics: {t: {table: none, turns: []}}": "x.yaml, topics.t: there is no table none",
    "tools: {t: {descriptions: d, parameters: {a: text}}}": "x.yaml, tools.t: the parameter 'text' is not",
    'tasks: {t: {tool: u, arguments: [], result: [], clauses: "a\\nb", answers: "c\\nd"}}': "there is no tool u",
    "a: [": "x.yaml: not YAML",
}


@pytest.mark.parametrize("text", WRONG)
def test_an_entry_that_is_wrong_is_named_by_file_and_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(CorpusError, match=WRONG[text]):
        content(tmp_path)


def test_a_wording_may_not_be_of_both_splits(tmp_path: Path) -> None:
    lines = ["one", "two", "three"]
    (tmp_path / "a.yaml").write_text('wordings: {w: "one\\ntwo\\nthree"}')
    train, (held_out,) = (content(tmp_path).wordings["w"].of(side) for side in (False, True))
    assert sorted([*train, held_out]) == sorted(lines)
    content.cache_clear()
    other = next(f"line {n}" for n in range(99) if _held_out_of(tmp_path / "b", held_out, f"line {n}") != held_out)
    (tmp_path / "b.yaml").write_text(f'wordings: {{v: "{held_out}\\n{other}"}}')
    with pytest.raises(CorpusError, match=rf"b\.yaml, wordings\.v: '{held_out}' is of the other split in a\.yaml"):
        content(tmp_path)
    content.cache_clear()


def _held_out_of(folder: Path, *lines: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "x.yaml").write_text('wordings: {w: "' + "\\n".join(lines) + '"}')
    content.cache_clear()
    return content(folder).wordings["w"].held_out[0]


def test_every_content_file_is_in_the_package() -> None:
    assert len(list(FOLDER.glob("*.yaml"))) >= 15
