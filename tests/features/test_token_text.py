"""Characters that several tokens write."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwenscope.features.token_text import alone, pieces_of, readable, vocabulary_pieces
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

    def convert_tokens_to_ids(self, names: list[str]) -> list[int | None]:
        return [None for _ in names]

    def convert_ids_to_tokens(self, _id: int) -> str:
        return self.name


@pytest.mark.parametrize(("name", "piece"), [("<0xE4>", b"\xe4"), ("Ġä", b" \xe4"), ("中", "\ufffd")])
def test_bytes_by_the_name_of_the_token(name: str, piece: str | bytes) -> None:
    assert pieces_of(Named(name), [0]) == [piece]  # type: ignore[arg-type]


TEXTS = ["The quick brown fox, it's 5 o'clock.", " led by a space", "two  spaces ", "naïve 日本 🙂 end", "a", "x\ny"]
CORPUS = [*TEXTS, "the quick brown fox jumps over the lazy dog " * 3, "it is quick. it is lazy, isn't it?"]
MARK = "\u2581"


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    return made


def tiktoken_style() -> Tokenizer:
    """As converted tiktoken files are: a split by pattern before the bytes, special tokens behind."""
    made = byte_level()
    split = pre_tokenizers.Split(Regex(r"\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
    made.add_special_tokens(["<|end|>"])
    return made


def metaspace(scheme: str) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"], show_progress=False)
    )
    return made


def llama() -> Tokenizer:
    """Llama 2's: a prepended mark, byte fallback, and a decoder that strips one space."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), MARK]
    letters = sorted(set("".join(CORPUS[:4]).replace("日本", "").replace("🙂", "").replace(" ", "")))
    words = [MARK + "q", "qu", MARK + "qu", MARK + MARK]
    made = Tokenizer(
        models.BPE(
            {token: id for id, token in enumerate([*tokens, *letters, *words])},
            [(MARK, "q"), ("q", "u"), (MARK + "q", "u"), (MARK, MARK)],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
    )
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    )
    return made


def word_ends() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False),
    )
    return made


def no_decoder() -> Tokenizer:
    made = word_piece()
    made.decoder = None
    return made


KINDS = {
    "byte-level": byte_level,
    "tiktoken": tiktoken_style,
    "metaspace, always": partial(metaspace, "always"),
    "metaspace, first": partial(metaspace, "first"),
    "metaspace, never": partial(metaspace, "never"),
    "llama": llama,
    "unigram": unigram,
    "word-piece": word_piece,
    "ends of words": word_ends,
    "no decoder": no_decoder,
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_every_kind_join_to_the_decoded_text(kind: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]())
    for text in [*TEXTS, "".join(TEXTS)]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        pieces = pieces_of(tokenizer, ids)
        assert "".join(readable(pieces)) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert len(pieces) == len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_vocabulary_join_inside_a_text(kind: str) -> None:
    """What the index keeps: one piece per id, wherever the token will stand; a text's first space may show."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]())
    vocabulary = vocabulary_pieces(tokenizer, len(tokenizer))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        joined = "".join(readable([vocabulary[id] for id in ids]))
        assert joined.strip(" ") == tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip(" ")


def test_words_of_a_llama_tokenizer_keep_their_spaces() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama())
    ids = tokenizer("The quick", add_special_tokens=False).input_ids
    assert readable(pieces_of(tokenizer, ids)) == ["", "T", "h", "e", " qu", "i", "c", "k"]
    assert readable(pieces_of(tokenizer, ids[4:])) == ["qu", "i", "c", "k"]
