"""Characters that several tokens write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qwenscope.features.token_text import alone, pieces_of, readable
from qwenscope.lm.standin import STANDIN_FOLDER

TOKENIZER = AutoTokenizer.from_pretrained(STANDIN_FOLDER)


def tokens_of(text: str) -> list[str]:
    return readable(pieces_of(TOKENIZER, TOKENIZER(text, add_special_tokens=False).input_ids))


@pytest.mark.parametrize("text", ["выигрыш 36 000", "每年都会 × 1.03", "👩‍👩‍👧 naïve", "plain", "", "<|im_start|>x"])
def test_tokens_join_to_their_text(text: str) -> None:
    assert "".join(tokens_of(text)) == text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_back(text: str) -> None:
    assert "".join(tokens_of(text)) == TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False).input_ids)


@given(st.text(max_size=20), st.data())
def test_any_cut_of_the_bytes_comes_back(text: str, data: st.DataObject) -> None:
    raw = text.encode("utf-8", "replace")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    found = readable(pieces)
    assert "".join(found) == raw.decode()
    assert len(found) == len(pieces)


def test_a_character_stands_at_its_first_token() -> None:
    assert readable([" a", b"\xd0", b"\xb3", "b"]) == [" a", "г", "", "b"]
    assert readable([b" \xe4", b"\xb8", b"\xad\xe6", b"\x96\x87"]) == [" 中文", "", "", ""]
    assert alone(b"\xd0") == "\ufffd"


def test_characters_that_break_off_are_replaced() -> None:
    assert readable([b"\xd0", "b"]) == ["\ufffd", "b"]
    assert readable(["a", b"\xe4\xb8"]) == ["a", "\ufffd"]
    assert readable([b"\xb3", b"\xd0", b"\xb3"]) == ["\ufffd", "г", ""]


class Named:
    """A tokenizer of one odd token."""

    def __init__(self, name: str) -> None:
        self.name = name

    def batch_decode(self, ids: list[list[int]], **_: bool) -> list[str]:
        return ["\ufffd" for _ in ids]

    def convert_ids_to_tokens(self, _id: int) -> str:
        return self.name


@pytest.mark.parametrize(("name", "piece"), [("<0xE4>", b"\xe4"), ("Ġä", b" \xe4"), ("中", "\ufffd")])
def test_bytes_by_the_name_of_the_token(name: str, piece: str | bytes) -> None:
    assert pieces_of(Named(name), [0]) == [piece]  # type: ignore[arg-type]
