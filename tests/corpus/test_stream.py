"""The stream: order, shares, splits, exact resume, changed and damaged sources, worker processes."""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import CorpusError
from qwenscope.recipe import CorpusRecipe, SourceRecipe

WriteRows = Callable[[str, list[Any]], Path]


def chat(text: str, answer: str = "yes") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


def corpus(*sources: SourceRecipe, **fields: Any) -> CorpusRecipe:
    return CorpusRecipe(sources=sources, **{"max_length": 256, "held_out_share": 0.1} | fields)


def files(path: Path, weight: float = 1.0, name: str = "files") -> SourceRecipe:
    return SourceRecipe(name=name, path=path, weight=weight)


@pytest.fixture
def mixed(tmp_path: Path, write_rows: WriteRows) -> CorpusRecipe:
    """Two folders of several shards and kinds with rows to drop, WildChat rows, and the generator."""
    draw = random.Random(0)
    for shard in range(3):
        rows: list[Any] = [chat(f"{shard} {i} " + "word " * draw.randrange(30)) for i in range(70)]
        rows[5], rows[40] = chat(""), {"messages": "broken"}
        write_rows(f"a/part-{shard}.jsonl" + (".gz" if shard == 1 else ""), rows)
    table = pa.Table.from_pylist([chat(f"p {i} " + "text " * draw.randrange(30)) for i in range(120)])
    (tmp_path / "b").mkdir()
    pq.write_table(table, tmp_path / "b" / "chats.parquet", row_group_size=25)
    turn = {"role": "user", "country": None, "redacted": False, "toxic": False}
    wildchat = [
        {
            "country": ("Japan", "France", None)[i % 3],
            "redacted": False,
            "toxic": i % 5 == 0,
            "conversation": [turn | {"content": f"mail bo{i}@firm.de", "country": ("Japan", "France", None)[i % 3]}],
        }
        for i in range(150)
    ]
    write_rows("w/rows.jsonl", wildchat)
    return corpus(
        files(tmp_path / "a", 0.3),
        files(tmp_path / "b", 0.2),
        files(tmp_path / "w", 0.1, "wildchat"),
        SourceRecipe(name="tool_use", weight=0.4),
    )


def take(stream: CorpusStream, count: int) -> list[Conversation]:
    return [conversation for _, conversation in zip(range(count), stream, strict=False)]


def same(a: Conversation, b: Conversation) -> bool:
    arrays = np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.roles, b.roles)
    return arrays and (a.id, a.source, a.text, a.messages, a.tools) == (b.id, b.source, b.text, b.messages, b.tools)


def set_chunk_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    for module in ("shards", "sources"):
        monkeypatch.setattr(f"qwenscope.corpus.{module}.CHUNK_ROWS", rows)


def test_two_hundred_stops_resume_exactly(
    mixed: CorpusRecipe, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_chunk_rows(monkeypatch, 3)  # little is read ahead, so that 200 stops cost little
    total = 420
    stream = CorpusStream(mixed, tokenizer, seed=3)
    states, whole = [json.dumps(stream.state())], []
    for _ in range(total):
        whole.append(next(stream))
        states.append(json.dumps(stream.state()))
    reports = CorpusStream(mixed, tokenizer, seed=3)
    for stop in random.Random(1).sample(range(total), 200):
        reports.restore(json.loads(states[stop]))
        ahead = min(total - stop, 1 + stop % 5)
        assert all(map(same, take(reports, ahead), whole[stop : stop + ahead]))
        assert json.dumps(reports.state()) == states[stop + ahead]
    for stop in (0, 1, 211, 419):
        fresh = CorpusStream(mixed, tokenizer, seed=3, revisions=stream.revisions)
        fresh.restore(json.loads(states[stop]))
        assert all(map(same, take(fresh, total - stop), whole[stop:]))
        assert fresh.report() == stream.report()
    assert {conversation.source for conversation in whole} == {"files", "files#2", "wildchat", "tool_use"}


def test_order_follows_the_seed(mixed: CorpusRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [[c.id for c in take(CorpusStream(mixed, tokenizer, seed=seed), 60)] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


def test_shares_follow_the_weights_in_tokens(mixed: CorpusRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
    stream = CorpusStream(mixed, tokenizer, seed=0)
    taken = take(stream, 80)  # before the smallest is used up
    longest = max(len(conversation.token_ids) for conversation in taken)
    report = stream.report()
    weights = {"files": 0.3, "files#2": 0.2, "wildchat": 0.1, "tool_use": 0.4}
    for id, weight in weights.items():
        assert abs(report["sources"][id]["tokens"] - weight * report["tokens"]) <= 2 * longest
    assert report["tokens"] == sum(len(conversation.token_ids) for conversation in taken)


@pytest.mark.slow
def test_shares_are_within_a_point_over_a_million_tokens(
    shared_data: Path, qwen_tokenizer: PreTrainedTokenizerBase
) -> None:
    chats = sorted((shared_data / "train").glob("chat_*.parquet"))
    sources = [files(chats[0], 0.35), files(shared_data / "train" / "tool_sgd.jsonl.gz", 0.35)]
    stream = CorpusStream(
        CorpusRecipe(sources=(*sources, SourceRecipe(name="tool_use", weight=0.3))), qwen_tokenizer, seed=0
    )
    tokens = 0
    while tokens < 1_000_000:
        tokens += len(next(stream).token_ids)
    shares = [source["share"] for source in stream.report()["sources"].values()]
    assert np.abs(np.array(shares) - [0.35, 0.35, 0.3]).max() < 0.01


def test_every_row_is_accounted_for(mixed: CorpusRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
    finite = mixed.model_copy(update={"sources": mixed.sources[:3]})
    stream = CorpusStream(finite, tokenizer, seed=0)
    conversations = list(stream)
    sources = stream.report()["sources"]
    assert {id: source["rows_in"] for id, source in sources.items()} == {"files": 210, "files#2": 120, "wildchat": 150}
    for id, source in sources.items():
        assert source["rows_in"] == source["rows_kept"] + source["other_split"] + sum(source["dropped"].values())
        assert source["rows_kept"] == source["conversations"] == sum(c.source == id for c in conversations)
    assert sources["files"]["dropped"] == {"empty_message": 3, "malformed_messages": 3}
    assert sources["wildchat"]["dropped"] == {"country": 50, "unknown_country": 50, "toxic": 10}
    assert sources["wildchat"]["dropped_countries"] == {"France": 50}
    assert stream.report()["scrubbed"] == {"EMAIL_ADDRESS": sources["wildchat"]["rows_kept"]}
    privacy = stream.report()["privacy"]
    assert list(privacy["sources"]) == ["wildchat"]
    assert privacy["rules"]["drop_countries"] is True


def test_train_and_held_out_share_nothing_and_lose_nothing(
    mixed: CorpusRecipe, tokenizer: PreTrainedTokenizerBase
) -> None:
    finite = mixed.model_copy(update={"sources": mixed.sources[:2]})
    train = {c.id for c in CorpusStream(finite, tokenizer, seed=0)}
    held_out = {c.id for c in CorpusStream(finite, tokenizer, seed=0, held_out=True)}
    assert not train & held_out
    assert len(train | held_out) == 204 + 120
    assert 10 < len(held_out) < 60
    generated = mixed.model_copy(update={"sources": mixed.sources[3:]})
    ids = [
        {c.id for c in take(CorpusStream(generated, tokenizer, seed=0, held_out=held), 40)} for held in (False, True)
    ]
    assert not ids[0] & ids[1]


def test_a_used_up_source_leaves_the_others_to_the_end(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerBase
) -> None:
    few, many = (
        write_rows("few.jsonl", [chat(f"f{i}") for i in range(3)]),
        write_rows("many.jsonl", [chat(f"m{i}") for i in range(90)]),
    )
    stream = CorpusStream(corpus(files(few), files(many), held_out_share=1e-9), tokenizer, seed=0)
    assert [c.source for c in stream].count("files#2") == 90
    state = stream.state()
    again = CorpusStream(corpus(files(few), files(many), held_out_share=1e-9), tokenizer, seed=0)
    again.restore(state)
    assert list(again) == []


def test_workers_return_the_same_and_their_state_is_of_what_was_returned(
    mixed: CorpusRecipe, tokenizer: PreTrainedTokenizerBase
) -> None:
    here, ahead = CorpusStream(mixed, tokenizer, seed=5), CorpusStream(mixed, tokenizer, seed=5, workers=2)
    assert all(map(same, take(here, 100), take(ahead, 100)))
    state = ahead.state()
    assert state == here.state()
    ahead.close()
    again = CorpusStream(mixed, tokenizer, seed=5)
    again.restore(state)
    assert all(map(same, take(here, 30), take(again, 30)))


SCRIPT = """
from transformers import AutoTokenizer
from qwenscope.corpus.stream import CorpusStream
from qwenscope.lm.standin import STANDIN_FOLDER
from qwenscope.recipe import CorpusRecipe, SourceRecipe

class Mine:
    pass

corpus = CorpusRecipe(sources=(SourceRecipe(name="tool_use", weight=1),))
stream = CorpusStream(corpus, AutoTokenizer.from_pretrained(STANDIN_FOLDER), seed=0, workers=2)
print("read", len([next(stream) for _ in range(5)]))
stream.close()
"""


@pytest.mark.parametrize("by", ["file", "stdin"])
def test_a_script_without_a_main_guard_may_have_workers(by: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, str(tmp_path / "script.py")] if by == "file" else [sys.executable, "-"]
    done = subprocess.run(words, input=SCRIPT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "read 5\n"


def test_a_changed_file_is_named(mixed: CorpusRecipe, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    stream = CorpusStream(mixed, tokenizer, seed=0)
    next(stream)
    path = tmp_path / "a" / "part-0.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(reversed(rows)))  # reordered: same size, same rows
    with pytest.raises(CorpusError, match=r"source files \(.*a\).*not what the run began with"):
        CorpusStream(mixed, tokenizer, seed=0, revisions=stream.revisions)
    with pytest.raises(CorpusError, match="source files is not the one"):
        CorpusStream(mixed, tokenizer, seed=0).restore(stream.state())
    path.unlink()
    with pytest.raises(CorpusError, match="not what the run began with"):
        CorpusStream(mixed, tokenizer, seed=0, revisions=stream.revisions)


def test_a_state_of_something_else_is_refused(mixed: CorpusRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
    state = CorpusStream(mixed, tokenizer, seed=0).state()
    with pytest.raises(CorpusError, match="another split"):
        CorpusStream(mixed, tokenizer, seed=0, held_out=True).restore(state)
    with pytest.raises(CorpusError, match="other sources"):
        CorpusStream(mixed.model_copy(update={"sources": mixed.sources[:2]}), tokenizer, seed=0).restore(state)
    with pytest.raises(CorpusError, match="version"):
        CorpusStream(mixed, tokenizer, seed=0).restore(state | {"version": 99})


def broken_files(folder: Path) -> dict[str, Path]:
    """Name of the defect -> a file or folder that has it."""
    lines = b"".join(json.dumps(chat(f"x{i}")).encode() + b"\n" for i in range(50))
    table = pa.Table.from_pylist([chat("x")] * 50)
    pq.write_table(table, folder / "whole.parquet")
    (folder / "empty folder").mkdir()
    (folder / "cut line.jsonl").write_bytes(lines[:-20])
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-30])
    (folder / "no gzip.jsonl.gz").write_bytes(lines)
    (folder / "cut.parquet").write_bytes((folder / "whole.parquet").read_bytes()[:-40])
    (folder / "no rows.jsonl").write_bytes(b"\n\n")
    pq.write_table(pa.table({"body": ["a"]}), folder / "no messages.parquet")
    pq.write_table(pa.table({"messages": [1, 2]}), folder / "numbers.parquet")
    damaged = bytearray((folder / "whole.parquet").read_bytes())
    damaged[4:60] = bytes(56)
    (folder / "damaged.parquet").write_bytes(damaged)
    return {path.name: path for path in (*folder.iterdir(), folder / "missing.jsonl")} | {"text": folder / "note.txt"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "no such file or folder"),
        ("empty folder", "holds no .parquet"),
        ("cut line.jsonl", "ends in the middle of line 50"),
        ("cut.jsonl.gz", "cut.jsonl.gz cannot be read"),
        ("no gzip.jsonl.gz", "no gzip.jsonl.gz cannot be read"),
        ("cut.parquet", "cut.parquet cannot be read"),
        ("damaged.parquet", "damaged.parquet cannot be read"),
        ("no rows.jsonl", "has no rows"),
        ("no messages.parquet", "no column messages or text; its columns are body"),
        ("numbers.parquet", r"keeps none of its 2 rows \(malformed_messages 2\)"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, message: str) -> None:
    path = broken_files(tmp_path)[name]
    with pytest.raises(CorpusError, match=f"source files.*{message}"):
        list(CorpusStream(corpus(files(path), held_out_share=1e-9), tokenizer, seed=0))


def test_lines_that_are_not_rows_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    good = json.dumps(chat("x")).encode()
    bad = [b"{not json", b"[]", b'"text"', b"\xff\xfe", b'{"messages": NaN}', b'{"messages": null}', b"[" * 10**5]
    surrogate = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([good, *bad, surrogate, b"", good]) + b"\n")
    stream = CorpusStream(corpus(files(tmp_path), held_out_share=1e-9), tokenizer, seed=0)
    assert len(list(stream)) == 2
    assert stream.report()["sources"]["files"]["dropped"] == {
        "malformed_row": 6,
        "malformed_messages": 1,
        "lone_surrogate": 1,
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_a_template_that_takes_nothing_ends_an_endless_source(tokenizer: PreTrainedTokenizerBase, workers: int) -> None:
    deaf = copy.copy(tokenizer)
    deaf.chat_template = "{{ raise_exception('Not a word.') }}"
    stream = CorpusStream(corpus(SourceRecipe(name="tool_use", weight=1)), deaf, seed=0, workers=workers)
    with pytest.raises(CorpusError, match=r"source tool_use .*1,000 conversations .*\(template: Not a word\. 1000\)"):
        next(stream)
    stream.close()


def test_reasons_that_differ_row_by_row_do_not_pile_up(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerBase
) -> None:
    talking = copy.copy(tokenizer)
    talking.chat_template = "{{ raise_exception(messages[0].content) }}"
    path = write_rows("rows.jsonl", [chat(f"row {i}") for i in range(300)])
    stream = CorpusStream(corpus(files(path), held_out_share=1e-9), talking, seed=0)
    with pytest.raises(CorpusError, match="keeps none of its 300 rows"):
        list(stream)
    dropped = stream.report()["sources"]["files"]["dropped"]
    assert len(dropped) == 101
    assert dropped["other"] == 200


def test_a_line_beyond_all_bounds_is_counted_and_the_next_one_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    good = json.dumps(chat("x")).encode()
    long = json.dumps(chat("y" * (3 << 24))).encode()
    exact = json.dumps(chat("z")).encode()
    exact += b" " * ((1 << 24) - 1 - len(exact))  # its line end is the last byte that is read
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([long, good, b"[" + b"{}," * 10**7, exact, long]))
    stream = CorpusStream(corpus(files(tmp_path), held_out_share=1e-9), tokenizer, seed=0)
    assert [c.messages[0]["content"] for c in stream] == ["x", "z"]
    assert stream.report()["sources"]["files"]["dropped"] == {"too_long": 3}


def test_a_file_name_that_is_no_text_is_read_like_any_other(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for number, name in enumerate((b"a\xff.jsonl", b"b\xfe.jsonl")):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_text(json.dumps(chat(f"x{number}")) + "\n")
    stream = CorpusStream(corpus(files(tmp_path), held_out_share=1e-9), tokenizer, seed=0)
    assert len(list(stream)) == 2


def test_surrogates_leave_a_row_out_even_where_the_template_does_not_show_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = chat("x")
    row["messages"][1]["tool_calls"] = [{"id": "\ud800", "function": {"name": "f", "arguments": {"\udfff": 1}}}]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(chat('y'))}\n")
    stream = CorpusStream(corpus(files(tmp_path), held_out_share=1e-9), tokenizer, seed=0)
    assert len(list(stream)) == 1
    assert stream.report()["sources"]["files"]["dropped"] == {"lone_surrogate": 1}


def test_parquet_arguments_lose_the_nulls_that_arrow_added(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = []
    for arguments in ({"city": "Oslo"}, {"x": 0.1, "deep": {"y": 1}}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        rows.append(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "calls.parquet")
    kept = list(CorpusStream(corpus(files(tmp_path), held_out_share=1e-9), tokenizer, seed=0))
    assert [c.messages[1]["tool_calls"][0]["function"]["arguments"] for c in kept] == [
        row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows
    ]


def test_chunks_do_not_matter(
    mixed: CorpusRecipe, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = take(CorpusStream(mixed, tokenizer, seed=0), 80)
    set_chunk_rows(monkeypatch, 7)
    assert all(map(same, expected, take(CorpusStream(mixed, tokenizer, seed=0), 80)))
