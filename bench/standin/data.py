"""Text of the stand-in language model: conversations, chat template, tokenizer, rows and n-gram reference losses.

The chat template is ChatML-like and looks at nothing ahead: the rendering of the first m messages is a prefix of the
rendering of all, so that the tokens of a turn are found by rendering twice.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from qwenscope.corpus.tool_use import generate_tool_use
from qwenscope.errors import CorpusError
from qwenscope.files import read_json, sha256

Conversation = dict[str, Any]
Rows = list[list[int]]

FILES = (
    "chat_arena_hard.parquet",
    "chat_gorilla_apibench.parquet",
    "chat_llamafactory_kto.parquet",
    "chat_llamafactory_pref.parquet",
    "chat_mtbench101.parquet",
    "tool_bfcl.jsonl.gz",
    "tool_llamafactory.jsonl.gz",
    "tool_taubench_airline.jsonl.gz",
    "tool_toolbench.jsonl.gz",
)
"""The files of the data folder that the stand-in is trained on: Apache-2.0 and MIT only, read by `MANIFEST.json`."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
HELD_OUT_SHARE = 0.05

CHAT_TEMPLATE = """\
{%- macro text(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- elif message.content -%}{{ raise_exception('message content must be a string') }}
{%- endif -%}
{%- endmacro -%}
{%- set system = messages[0] if messages and messages[0].role == 'system' else none -%}
{%- if system or tools -%}
<|im_start|>system
{% if system %}{{ text(system) }}{% endif %}
{%- if tools %}
{%- if system %}{{ '\\n\\n' }}{% endif %}Tools, one per line; call them as {"name": ..., "arguments": {...}}:
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- if not loop.first -%}{{ raise_exception('a system message must come first') }}{%- endif -%}
{%- elif message.role == 'user' -%}
{{ '<|im_start|>user\\n' }}{{ text(message) }}{{ '<|im_end|>\\n' }}
{%- elif message.role == 'tool' -%}
{{ '<|im_start|>tool\\n<tool_response>\\n' }}{{ text(message) }}{{ '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content %}{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{% endif -%}
{{ text(message) }}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function if call.function else call -%}
{%- if function.arguments is not mapping -%}{{ raise_exception('tool call arguments must be a mapping') }}{%- endif -%}
{%- if message.content or not loop.first %}{{ '\\n' }}{% endif -%}
{{ '<tool_call>\\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
{{ (function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- else -%}
{{ raise_exception('unknown role ' + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Rows with `messages` (and `tools`) of a .parquet or .jsonl.gz file; empty optional fields are left out."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        yield from pq.read_table(path, columns=["messages"]).to_pylist()
        return
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def data_entries(folder: Path) -> list[dict[str, Any]]:
    """The manifest's entries of `FILES` (repository, commit, licence, conversations), after checking each checksum.

    Raises:
        CorpusError: a file or its entry is missing, its licence is another one, or its bytes changed.
    """
    places = [place for place in (folder / "MANIFEST.json", folder.parent / "MANIFEST.json") if place.is_file()]
    if not places:
        raise CorpusError(f"no MANIFEST.json in {folder} or above it; --data must name the folder of the data files")
    entries = {Path(entry["file"]).name: entry for entry in read_json(places[0])}
    for name in FILES:
        if name not in entries or not (folder / name).is_file():
            raise CorpusError(f"{folder / name} or its manifest entry is missing; restore the data folder")
        if not entries[name]["licence"].startswith(("Apache-2.0", "MIT")):
            raise CorpusError(f"{name} is under {entries[name]['licence']}; only Apache-2.0 and MIT text is used")
        if sha256(folder / name) != entries[name]["sha256"]:
            raise CorpusError(f"{folder / name} differs from its manifest entry; restore the file")
    keys = ("file", "repo", "commit", "licence", "sha256")
    return [{key: entries[name][key] for key in keys} for name in FILES]


def render_all(data: Path | None, generated: int, seed: int) -> dict[str, dict[str, list[str]]]:
    """Rendered conversations as {"train" | "held_out": {"chat" | "tool_use" | "generated": texts}}.

    Real conversations are held out by the hash of their rendering (so duplicates stay on one side); generated ones by
    the generator's own split, whose held-out wordings are disjoint from those trained on.
    """
    renderer = wrap_tokenizer({}, [])
    splits: dict[str, dict[str, list[str]]] = {"train": {}, "held_out": {}}
    for name in FILES if data is not None else ():
        assert data is not None
        group = "chat" if name.startswith("chat") else "tool_use"
        for conversation in read_conversations(data / name):
            text = render(renderer, conversation)
            draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32
            splits["held_out" if draw < HELD_OUT_SHARE else "train"].setdefault(group, []).append(text)
    held_out = max(1, round(generated * HELD_OUT_SHARE))
    for split, count in (("train", generated), ("held_out", held_out)):
        conversations = generate_tool_use(count, seed, held_out=split == "held_out")
        splits[split]["generated"] = [render(renderer, conversation) for conversation in conversations]
    return splits


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """The whole conversation as text, tools in the system turn."""
    text = tokenizer.apply_chat_template(
        conversation["messages"], tools=conversation.get("tools") or None, tokenize=False
    )
    assert isinstance(text, str)
    return text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE of `vocab_size` ids; the template's marks take the last ones."""
    plain = Qwen3_5Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    marks = re.compile("|".join(re.escape(mark) for mark in SPECIAL + MARKERS))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL + MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for text in texts for part in marks.split(text)), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return wrap_tokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]])


def wrap_tokenizer(vocab: dict[str, int], merges: list[Any]) -> PreTrainedTokenizerBase:
    """Vocabulary, merges, our marks and chat template in the class that AutoTokenizer takes for a Qwen3.5 model.

    Any other class would be replaced on loading, and text split another way than in training.
    """
    marks = {mark: len(vocab) + i for i, mark in enumerate(SPECIAL + MARKERS)}
    tokenizer = Qwen3_5Tokenizer(
        vocab=vocab | marks,
        merges=merges,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in MARKERS])
    return tokenizer


def rows_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, shortest: int = 16) -> Rows:
    """Token rows of at most `length`: each conversation cut into consecutive rows, short leftovers dropped."""
    rows = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        rows += [ids[start : start + length] for start in range(0, len(ids), length) if len(ids) - start >= shortest]
    return rows


def batches(rows: Rows, tokens: int, pad: int, rng: Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless right-padded batches of rows of similar length, at most about `tokens` ids each.

    Yields:
        ids [B, T] int64 and the mask of real tokens [B, T] bool; every row once per pass, order drawn from `rng`.
    """
    while True:
        order = sorted(rng.sample(range(len(rows)), len(rows)), key=lambda i: len(rows[i]) + rng.randrange(16))
        groups: list[list[int]] = [[]]
        for i in order:
            if groups[-1] and (len(groups[-1]) + 1) * max(len(rows[i]), len(rows[groups[-1][-1]])) > tokens:
                groups.append([])
            groups[-1].append(i)
        rng.shuffle(groups)
        for group in groups:
            yield pad_rows([rows[i] for i in group], pad)


def pad_rows(rows: Rows, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, T] int64 and the mask of real tokens [B, T] bool."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(longest)[None, :] < lengths[:, None]


class NgramTables:
    """Unigram (add one) and interpolated Kneser-Ney bigram tables (Ney, Essen and Kneser 1994) of token rows."""

    def __init__(self, rows: Rows, vocab_size: int) -> None:
        before, after = _pairs(rows)
        self.vocab_size = vocab_size
        unigram = np.bincount(after, minlength=vocab_size) + 1.0
        self.unigram = unigram / unigram.sum()
        self.keys, counts = np.unique(before * vocab_size + after, return_counts=True)
        self.counts = counts.astype(np.float64)
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        self.discount = once / max(once + 2 * twice, 1)
        self.totals = np.bincount(before, minlength=vocab_size).astype(np.float64)
        self.followers = np.bincount(self.keys // vocab_size, minlength=vocab_size)
        continuation = np.bincount(self.keys % vocab_size, minlength=vocab_size) + 0.1
        self.continuation = continuation / continuation.sum()

    def losses(self, rows: Rows) -> tuple[float, float]:
        """Mean unigram and bigram cross-entropy in nats per token over all but the first token of each row."""
        before, after = _pairs(rows)
        place = np.searchsorted(self.keys, keys := before * self.vocab_size + after).clip(max=len(self.keys) - 1)
        counts = np.where(self.keys[place] == keys, self.counts[place], 0.0)
        totals = self.totals[before]
        seen = totals > 0
        backoff = np.where(seen, self.discount * self.followers[before] / np.maximum(totals, 1), 1.0)
        direct = np.maximum(counts - self.discount, 0) / np.maximum(totals, 1)
        bigram = direct + backoff * self.continuation[after]
        return float(-np.log(self.unigram[after]).mean()), float(-np.log(bigram).mean())


def _pairs(rows: Rows) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All (token, next token) pairs within rows."""
    before = np.concatenate([np.asarray(row[:-1], dtype=np.int64) for row in rows])
    after = np.concatenate([np.asarray(row[1:], dtype=np.int64) for row in rows])
    return before, after
