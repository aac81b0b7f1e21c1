"""Sources on a Hub that answers over real HTTP, fails, resets and truncates."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub

from qwenscope.corpus.sources import open_source
from qwenscope.errors import CorpusError, HubError
from qwenscope.hub import PAUSES
from qwenscope.recipe import SourceRecipe


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


def parquet(rows: list[dict[str, Any]], row_group_size: int = 10) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=row_group_size)
    return buffer.getvalue()


def chats(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": "x" * 50,
            "messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "yes"}],
        }
        for i in range(first, first + count)
    ]


def ultrachat() -> dict[str, bytes]:
    return {
        "README.md": b"# card",
        "data/train_sft-00000-of-00002.parquet": parquet(chats(0, 45)),
        "data/train_sft-00001-of-00002.parquet": parquet(chats(100, 45)),
        "data/test_sft-00000-of-00001.parquet": parquet(chats(200, 20)),
        "data/train_gen-00000-of-00001.parquet": parquet(chats(300, 20)),
    }


def questions(recipe: SourceRecipe, held_out: bool = False, pinned: str | None = None, seed: int = 0) -> list[str]:
    source = open_source(recipe, "it", seed, held_out, pinned)
    return [row["messages"][0]["content"] for chunk in source.chunks(0, 0) for _, row in chunk.rows]


def test_ultrachat_is_read_by_its_own_splits_in_seeded_order(hub: FakeHub) -> None:
    hub.add("datasets", "HuggingFaceH4/ultrachat_200k", ultrachat())
    recipe = SourceRecipe(name="ultrachat", weight=1)
    train = questions(recipe)
    assert sorted(train) == sorted(f"question {i}" for i in (*range(45), *range(100, 145)))
    assert sorted(questions(recipe, held_out=True)) == sorted(f"question {i}" for i in range(200, 220))
    assert questions(recipe) == train
    assert any(questions(recipe, seed=seed) != train for seed in (1, 2))


def test_the_first_commit_stays_pinned_when_the_dataset_moves_on(hub: FakeHub) -> None:
    repo = "org/tools"
    old = hub.add("datasets", repo, {"data.parquet": parquet(chats(0, 5))})
    recipe = SourceRecipe(name="tool_use", repo=repo, weight=1)
    assert open_source(recipe, "tool_use", 0, False, None).revision == old
    new = hub.add("datasets", repo, {"data.parquet": parquet(chats(50, 5))})
    assert open_source(recipe, "tool_use", 0, False, None).revision == new
    assert open_source(recipe, "tool_use", 0, False, old).revision == old
    assert sorted(questions(recipe, pinned=old)) == [f"question {i}" for i in range(5)]


def test_any_row_can_be_sought(hub: FakeHub) -> None:
    hub.add("datasets", "HuggingFaceH4/ultrachat_200k", ultrachat())
    source = open_source(SourceRecipe(name="ultrachat", weight=1), "ultrachat", 0, False, None)
    whole = [(chunk.shard, index, row) for chunk in source.chunks(0, 0) for index, row in chunk.rows]
    for position in range(0, len(whole), 17):
        shard, index, _ = whole[position]
        rest = [(chunk.shard, i, row) for chunk in source.chunks(shard, index) for i, row in chunk.rows]
        assert rest == whole[position:]


@pytest.mark.parametrize("fault", [500, 503, 429, "reset", "truncate"])
@pytest.mark.parametrize("where", ["/api/datasets", "/resolve/"])
def test_transient_faults_are_waited_out(hub: FakeHub, fault: int | str, where: str) -> None:
    hub.add("datasets", "HuggingFaceH4/ultrachat_200k", ultrachat())
    recipe = SourceRecipe(name="ultrachat", weight=1)
    expected = questions(recipe)
    hub.fail(where, fault, fault)
    assert questions(recipe) == expected
    assert not hub.faults


def test_a_fault_in_the_middle_of_a_shard_loses_and_repeats_nothing(hub: FakeHub) -> None:
    hub.add("datasets", "HuggingFaceH4/ultrachat_200k", ultrachat())
    recipe = SourceRecipe(name="ultrachat", weight=1)
    expected = questions(recipe)
    chunks = open_source(recipe, "ultrachat", 0, False, None).chunks(0, 0)
    read = next(chunks).rows
    hub.fail("/resolve/", "reset", 502, "truncate", "reset")
    read += [row for chunk in chunks for row in chunk.rows]
    assert [row["messages"][0]["content"] for _, row in read] == expected


def test_a_hub_that_stays_down_is_named(hub: FakeHub) -> None:
    hub.add("datasets", "allenai/WildChat-1M", {"data/train-0.parquet": parquet(chats(0, 5))})
    hub.fail("/api/datasets/allenai/WildChat-1M", *[500] * 10 * (len(PAUSES) + 1))
    with pytest.raises(HubError, match=r"wildchat \(allenai/WildChat-1M\): .*still so after 5 more tries"):
        open_source(SourceRecipe(name="wildchat", weight=1), "wildchat", 0, False, None)


def test_a_missing_dataset_or_revision_is_named_at_once(hub: FakeHub) -> None:
    with pytest.raises(CorpusError, match="org/none"):
        open_source(SourceRecipe(name="tool_use", repo="org/none", weight=1), "tool_use", 0, False, None)
    hub.add("datasets", "org/empty", {"README.md": b"nothing"})
    with pytest.raises(CorpusError, match=r"org/empty.*holds no"):
        open_source(SourceRecipe(name="tool_use", repo="org/empty", weight=1), "tool_use", 0, False, None)
    with pytest.raises(CorpusError, match="org/empty"):
        open_source(
            SourceRecipe(name="tool_use", repo="org/empty", revision="v9", weight=1), "tool_use", 0, False, None
        )
    assert len(hub.requests) < 10


def test_offline_is_said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        open_source(SourceRecipe(name="ultrachat", weight=1), "ultrachat", 0, False, None)


def test_a_shard_stored_truncated_is_named(hub: FakeHub) -> None:
    hub.add("datasets", "org/cut", {"cut.parquet": parquet(chats(0, 50))[:-100]})
    source = open_source(SourceRecipe(name="tool_use", repo="org/cut", weight=1), "tool_use", 0, False, None)
    with pytest.raises(CorpusError, match=r"org/cut.*cut\.parquet"):
        list(source.chunks(0, 0))


@pytest.mark.parametrize("compressed", [False, True])
def test_json_lines_keep_floats_and_arguments(hub: FakeHub, compressed: bool) -> None:
    call = {"name": "f", "arguments": {"x": 0.1, "y": 1e-300, "n": None, "z": 12345678901234567890, "text": "é\u2028"}}
    row = {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}]}
    data = (json.dumps(row) + "\n").encode() * 40
    name = "tools.jsonl.gz" if compressed else "tools.jsonl"
    hub.add("datasets", "org/tools", {name: gzip.compress(data) if compressed else data})
    source = open_source(SourceRecipe(name="tool_use", repo="org/tools", weight=1), "tool_use", 0, False, None)
    hub.fail("/resolve/", 500, "reset")
    rows = [row for chunk in source.chunks(0, 0) for row in chunk.rows]
    assert rows == [(i, row) for i in range(40)]


def test_only_the_wildchat_columns_that_are_needed_are_read(hub: FakeHub, shared_data: Path) -> None:
    fixture = shared_data / "fixtures" / "wildchat_schema_SYNTHETIC_META.parquet"
    hub.add("datasets", "allenai/WildChat-1M", {"data/train-00000-of-00001.parquet": fixture.read_bytes()})
    source = open_source(SourceRecipe(name="wildchat", weight=1), "wildchat", 0, False, None)
    rows = [row for chunk in source.chunks(0, 0) for _, row in chunk.rows]
    assert len(rows) == 600
    assert {key for row in rows for key in row} == {"conversation", "country", "redacted", "toxic"}
    turn_keys = {key for row in rows for turn in row["conversation"] for key in turn}
    assert turn_keys == {"content", "role", "country", "redacted", "toxic"}


CARD = b"""---
configs:
- config_name: small
  data_files:
  - {split: train, path: sample/small/*}
  - {split: test, path: sample/test/*}
- config_name: all
  data_files: "**/*.parquet"
---
"""


def texts(recipe: SourceRecipe) -> list[str]:
    source = open_source(recipe, "it", 0, False, None)
    return sorted(row["text"] for chunk in source.chunks(0, 0) for _, row in chunk.rows)


def test_documents_of_a_dataset_are_read_by_configuration_and_column(hub: FakeHub) -> None:
    files = {
        f"sample/{name}.parquet": parquet([{"body": name, "id": 1}])
        for name in ("small/a", "small/b", "small/deep/c", "test/d", "big/e")
    }
    hub.add("datasets", "org/web", {"README.md": CARD, **files})
    recipe = SourceRecipe(name="files", repo="org/web", config="small", text="body", weight=1)
    assert texts(recipe) == ["small/a", "small/b"]
    assert len(texts(recipe.model_copy(update={"config": "all"}))) == 5
    assert texts(recipe.model_copy(update={"config": "sample/big"})) == ["big/e"]  # a folder, undeclared
    with pytest.raises(CorpusError, match=r"org/web\) has the configs all, small; name one with config"):
        texts(recipe.model_copy(update={"config": None}))
    with pytest.raises(CorpusError, match=r"org/web none\) has no config none; it has all, small"):
        texts(recipe.model_copy(update={"config": "none"}))
    with pytest.raises(CorpusError, match=r"no column messages or text; its columns are body, id"):
        texts(recipe.model_copy(update={"text": None}))


def test_of_a_dataset_without_configurations_the_training_files_are_read(hub: FakeHub) -> None:
    names = ("data/train-00000", "data/test-00000", "data/constrained")
    hub.add("datasets", "org/plain", {f"{name}.parquet": parquet([{"text": name}]) for name in names})
    assert texts(SourceRecipe(name="files", repo="org/plain", weight=1)) == ["data/train-00000"]
