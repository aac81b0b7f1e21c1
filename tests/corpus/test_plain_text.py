"""Documents: as the tokenizer has them, each token once, cut as by hand, resumable within one, named where wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qwenscope.corpus import tokens
from qwenscope.corpus.conversation import ROLES, Conversation
from qwenscope.corpus.documents import Documents
from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import CorpusError, RecipeError
from qwenscope.recipe import CorpusRecipe, SourceRecipe, load_recipe

WriteRows = Callable[[str, list[Any]], Path]
TEXTS = [f"Row {i}: the {'quick brown fox, ' * (i % 9)}jumps over {i} lazy dogs.\nÉté № {i}" for i in range(60)]


def make_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """`bytes` writes nothing around a text, `bos` <s> before it, `ends` <s> and </s>, `words` is of the kind that marks
    spaces by a character of its own.
    """
    special = ["<s>", "</s>"]
    backend = Tokenizer(models.BPE())
    if kind == "words":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet = sorted(set("".join(TEXTS)) | {"▁"})
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 100 if kind == "words" else 400
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    )
    if kind != "bytes":
        around = "<s> $A </s>" if kind == "ends" else "<s> $A"
        ids = [(token, backend.token_to_id(token)) for token in special]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {kind: make_tokenizer(kind) for kind in ("bytes", "bos", "ends", "words")}


@pytest.fixture(params=TOKENIZERS)
def plain(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]


def corpus(path: Path, **fields: Any) -> CorpusRecipe:
    columns = {name: fields.pop(name) for name in ("text", "messages", "tools") if name in fields}
    source = SourceRecipe(name="files", path=path, weight=1.0, **columns)
    return CorpusRecipe(sources=(source,), **{"max_length": 16, "held_out_share": 1e-9} | fields)


def read(path: Path, tokenizer: PreTrainedTokenizerBase, **fields: Any) -> list[Conversation]:
    return list(CorpusStream(corpus(path, **fields), tokenizer, seed=0))


def test_a_document_is_the_tokenizers_own_ids(write_rows: WriteRows, plain: PreTrainedTokenizerBase) -> None:
    path = write_rows("texts.jsonl", [{"text": text} for text in TEXTS])
    rows = read(path, plain, max_length=10_000)
    assert [row.token_ids.tolist() for row in rows] == [plain(text).input_ids for text in TEXTS]
    assert [row.text for row in rows] == TEXTS
    assert {row.split for row in rows} == {"text"}
    assert not any(row.truncated for row in rows)
    for row in rows:
        special = np.isin(row.token_ids, plain.all_special_ids)
        assert [ROLES[role] for role in row.roles] == ["template" if added else "text" for added in special]
        assert (row.token_ids == plain.bos_token_id).sum() == (plain is not TOKENIZERS["bytes"])


def test_longer_ones_are_truncated_and_counted(write_rows: WriteRows, plain: PreTrainedTokenizerBase) -> None:
    path = write_rows("texts.jsonl", [{"text": text} for text in TEXTS])
    stream = CorpusStream(corpus(path, max_length=4), plain, seed=0)
    wanted = [plain(text).input_ids for text in TEXTS]
    assert [row.token_ids.tolist() for row in stream] == [ids[:4] for ids in wanted]
    (counts,) = stream.report()["sources"].values()
    assert counts["truncated"] == sum(len(ids) > 4 for ids in wanted) > 0


def by_hand(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    ids = tokenizer(text).input_ids
    begins = [ids[0]] if ids[0] == tokenizer.bos_token_id else []
    rest = ids[len(begins) :]
    room = length - len(begins)
    return [begins + rest[start : start + room] for start in range(0, len(rest), room)]


def test_a_split_is_the_one_made_by_hand(write_rows: WriteRows, plain: PreTrainedTokenizerBase) -> None:
    path = write_rows("texts.jsonl", [{"text": text} for text in TEXTS])
    stream = CorpusStream(corpus(path, long_documents="split"), plain, seed=0)
    rows = list(stream)
    assert [row.token_ids.tolist() for row in rows] == [ids for text in TEXTS for ids in by_hand(text, plain, 16)]
    assert "".join(row.text for row in rows) == "".join(TEXTS)
    assert len({row.id for row in rows}) == len(rows)
    (counts,) = stream.report()["sources"].values()
    assert counts["rows_in"] == counts["rows_kept"] == len(TEXTS)
    assert counts["conversations"] == len(rows) == len(TEXTS) + counts["split_off"]
    assert counts["truncated"] == 0


def test_a_stop_within_a_document_resumes_exactly(write_rows: WriteRows) -> None:
    path = write_rows("texts.jsonl", [{"text": text} for text in TEXTS])
    recipe, tokenizer = corpus(path, long_documents="split", max_length=5), TOKENIZERS["bos"]
    stream = CorpusStream(recipe, tokenizer, seed=0)
    states, whole = [stream.state()], []
    for row in stream:
        whole.append(row)
        states.append(json.loads(json.dumps(stream.state())))
    for stop in range(0, len(whole), 7):
        again = CorpusStream(recipe, tokenizer, seed=0)
        again.restore(states[stop])
        assert [row.id for row in again] == [row.id for row in whole[stop:]]
        assert again.report() == stream.report()
    with_workers = CorpusStream(recipe, tokenizer, seed=0, workers=1)
    with_workers.restore(states[40])
    assert [row.id for row in with_workers] == [row.id for row in whole[40:]]


def test_all_parts_of_a_document_are_held_out_together(write_rows: WriteRows) -> None:
    path = write_rows("texts.jsonl", [{"text": text} for text in TEXTS])
    recipe = corpus(path, long_documents="split", held_out_share=0.3)
    parts = [
        "".join(row.text for row in CorpusStream(recipe, TOKENIZERS["bos"], seed=0, held_out=held))
        for held in (False, True)
    ]
    assert sum(map(len, parts)) == len("".join(TEXTS))
    assert all((text in parts[0]) != (text in parts[1]) for text in TEXTS)


@given(st.text(min_size=1, max_size=40), st.integers(2, 12), st.booleans())
def test_any_text_gives_each_of_its_tokens_once(text: str, length: int, ends: bool) -> None:
    tokenizer = TOKENIZERS["ends" if ends else "bos"]
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    (rows,) = Documents(tokenizer, length, split=True).encode([text])
    assert [row.token_ids.tolist() for row in rows] == by_hand(text, tokenizer, length)


def test_a_text_that_writes_bos_itself_has_one() -> None:
    ((row,),) = Documents(TOKENIZERS["bos"], 100).encode(["<s>fox"])
    assert row.token_ids.tolist() == TOKENIZERS["bos"]("fox").input_ids


def test_a_huge_document_is_tokenised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(TEXTS)
    whole = TOKENIZERS["bos"](text).input_ids
    for module in ("tokens", "documents"):
        monkeypatch.setattr(f"qwenscope.corpus.{module}.MOST_CHARACTERS", 500)
    parts = list(tokens._parts(text))
    assert "".join(part for _, part in parts) == text
    assert max(len(part) for _, part in parts) <= 500
    assert all(text[start] == "\n" for start, _ in parts[1:])
    (rows,) = Documents(TOKENIZERS["bos"], 100, split=True).encode([text])
    assert [id for row in rows for id in row.token_ids[1:]] == whole[1:]
    assert "".join(row.text for row in rows) == text
    ((row,),) = Documents(TOKENIZERS["bos"], 100).encode([text])
    assert row.token_ids.tolist() == whole[:100]
    assert row.truncated


def test_what_is_no_document_is_counted(write_rows: WriteRows) -> None:
    bad = [{"text": ""}, {"text": " \n"}, {"text": 3}, {"text": None}, {"id": 1}, {"text": "\ud800"}, "text"]
    stream = CorpusStream(corpus(write_rows("texts.jsonl", [{"text": "fox"}, *bad])), TOKENIZERS["bos"], seed=0)
    assert [row.text for row in stream] == ["fox"]
    (counts,) = stream.report()["sources"].values()
    assert counts["dropped"] == {
        "empty_text": 2, "malformed_text": 2, "no_text_or_messages": 1, "lone_surrogate": 1, "malformed_row": 1,
    }  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_are_named_in_the_recipe(tmp_path: Path, suffix: str) -> None:
    rows = [{"body": text, "talk": [{"role": "user", "content": text}], "n": 1} for text in TEXTS]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.text for row in read(path, TOKENIZERS["bos"], text="body")] == TEXTS
    talking = make_tokenizer("bos")
    talking.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    found = read(path, talking, messages="talk", max_length=10_000)
    assert {row.split for row in found} == {"chat"}
    assert [row.token_ids.tolist() for row in found] == [
        talking(text, add_special_tokens=False).input_ids for text in TEXTS
    ]
    with pytest.raises(CorpusError, match=r"has no column bodi; its columns are body, n, talk: name the one"):
        read(path, TOKENIZERS["bos"], text="bodi")
    with pytest.raises(CorpusError, match="has no column messages or text; its columns are body, n, talk"):
        read(path, TOKENIZERS["bos"])


def test_conversations_need_a_template_and_the_recipe_may_bring_one(write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows("chat.jsonl", [{"messages": [{"role": "user", "content": "fox"}]}])
    with pytest.raises(CorpusError, match=r"has no chat template, which conversations need: .*corpus.chat_template"):
        read(path, TOKENIZERS["bos"])
    with pytest.raises(CorpusError, match="has no chat template"):
        CorpusStream(CorpusRecipe(sources=(SourceRecipe(name="chat", weight=1),)), TOKENIZERS["bos"], seed=0)
    (tmp_path / "own.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    recipe = corpus(path, chat_template=str(tmp_path / "own.jinja"))
    assert recipe.chat_template == (tmp_path / "own.jinja").read_text()
    assert CorpusRecipe.model_validate(recipe.model_dump(mode="json")) == recipe
    (row,) = CorpusStream(recipe, TOKENIZERS["bos"], seed=0)
    assert row.token_ids.tolist() == TOKENIZERS["bos"]("fox").input_ids
    assert TOKENIZERS["bos"].chat_template is None
    with pytest.raises(RecipeError, match=r"corpus.chat_template: the file cannot be read"):
        load_recipe("standin", ["corpus.chat_template=none.jinja"])


def test_rows_too_short_for_what_comes_before_a_text_are_refused() -> None:
    with pytest.raises(CorpusError, match="begins each text with 1 tokens"):
        Documents(TOKENIZERS["bos"], 1)
