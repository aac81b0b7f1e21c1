"""The survey: the contract's object, the dump, the padding, the privacy report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qwenscope.corpus.privacy import FILTER_VERSION
from qwenscope.corpus.survey import survey
from qwenscope.errors import CorpusError
from qwenscope.lm.batches import cut
from qwenscope.recipe import Recipe, load_recipe

WriteRows = Callable[[str, list[Any]], Path]


def recipe(*sources: dict[str, Any], **corpus: Any) -> Recipe:
    tree = load_recipe("standin").model_dump()
    tree["corpus"] |= {"sources": sources, "max_length": 128, "batch_tokens": 1024} | corpus
    tree["training"] |= {"tokens": 60_000}
    return Recipe.model_validate(tree)


def chats(count: int) -> list[Any]:
    return [{"messages": [{"role": "user", "content": f"{i} " + "x" * (i % 150)}]} for i in range(count)]


def test_a_local_corpus_is_surveyed_whole(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_rows("rows.jsonl", [*chats(400), {"messages": []}])
    dump = tmp_path / "dump.jsonl"
    report = survey(recipe({"name": "files", "path": path, "weight": 1}), tokenizer, cut, dump=dump)
    rows = [json.loads(line) for line in dump.read_text(encoding="utf-8").splitlines()]
    source = report["sources"]["files"]
    assert (source["rows_in"], source["rows_kept"], source["conversations"], len(rows)) == (401, 400, 400, 400)
    assert source["dropped"] == {"malformed_messages": 1}
    assert source["share"] == 1.0
    assert source["truncated"] == sum(len(tokenizer(row["text"])["input_ids"]) > 128 for row in rows) > 0
    assert source["tokens"] == report["tokens"] == sum(row["n_tokens"] for row in rows)
    assert {"source", "messages", "text", "n_tokens"} <= rows[0].keys()
    assert 0 < report["padding_share"] < 0.2
    assert report["scrubbed"] == {}
    json.dumps(report, allow_nan=False)


def test_an_endless_corpus_is_surveyed_as_far_as_a_run_goes(tokenizer: PreTrainedTokenizerBase) -> None:
    report = survey(recipe({"name": "tool_use", "weight": 1}), tokenizer, cut)
    assert 60_000 <= report["tokens"] < 60_000 + 128


def test_a_limit_counts_conversations(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    dump = tmp_path / "dump.jsonl"
    report = survey(recipe({"name": "tool_use", "weight": 1}), tokenizer, cut, limit=7, dump=dump)
    assert report["sources"]["tool_use"]["conversations"] == len(dump.read_text(encoding="utf-8").splitlines()) == 7


def test_a_dying_source_leaves_no_dump(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_rows("rows.jsonl", chats(100))
    path.write_bytes(path.read_bytes()[:-5])
    dump = tmp_path / "dumps" / "dump.jsonl"
    dump.parent.mkdir()
    with pytest.raises(CorpusError, match="middle of line 100"):
        survey(recipe({"name": "files", "path": path, "weight": 1}), tokenizer, cut, dump=dump)
    assert list(dump.parent.iterdir()) == []


def test_the_fixture_through_the_survey(shared_data: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    fixture = shared_data / "fixtures" / "wildchat_schema_SYNTHETIC_META.parquet"
    report = survey(
        recipe({"name": "wildchat", "path": fixture, "weight": 1}), tokenizer, cut, dump=tmp_path / "dump.jsonl"
    )
    source = report["sources"]["wildchat"]
    assert (source["rows_in"], source["rows_kept"]) == (600, 250)
    assert source["dropped"] == {"country": 200, "unknown_country": 50, "redacted": 50, "toxic": 50}
    assert report["scrubbed"] == dict.fromkeys(report["scrubbed"], 10)
    assert len(report["scrubbed"]) == 5
    text = (tmp_path / "dump.jsonl").read_text(encoding="utf-8")
    assert "hashed_ip" not in text
    assert "posta-esempio" not in text
    privacy = report["privacy"]
    assert privacy["sources"]["wildchat"]["dropped_countries"]["Germany"] > 50
    assert privacy["sources"]["wildchat"]["revision"].startswith("sha256:")
    assert privacy["filter_version"] == FILTER_VERSION
