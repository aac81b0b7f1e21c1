"""The corpus as it will be trained on, before anyone pays for a GPU: counts, shares, padding, what privacy removed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.stream import CorpusStream
from qwenscope.files import atomic_path
from qwenscope.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cut = Callable[[Sequence[int], int, torch.device], list[list[int]]]
"""Maps the lengths of conversations, a budget of tokens and the model's device to the members of each batch."""


def survey(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, cut: Cut, *, limit: int | None = None, dump: Path | None = None
) -> dict[str, Any]:
    """Read the corpus and measure it; held-out conversations are part of it.

    Args:
        recipe: corpus, seed and window size are used.
        tokenizer: the language model's.
        cut: how a window's conversations become batches, of which padding is a share.
        limit: conversations to read. By default all of a finite local corpus, and as many as a run trains on otherwise.
        dump: write each kept conversation there as a JSON line {source, messages, tools, text, n_tokens}, whole or not
            at all.

    Returns:
        {"sources": {id: {"rows_in", "rows_kept", "dropped": {reason: n}, "conversations", "tokens", "share",
        "truncated", ...}}, "scrubbed": {kind: n}, "padding_share", "tokens", "privacy": see `privacy_report`}.

    Raises:
        CorpusError: a source is missing, empty, malformed or died.
    """
    corpus = recipe.corpus.model_copy(update={"held_out_share": 0.0})
    stream = CorpusStream(corpus, tokenizer, seed=recipe.seed, workers=corpus.workers)
    local = stream.finite and all(source.path is not None for source in corpus.sources)
    token_limit = None if local else recipe.training.tokens
    padding = _Padding(recipe, cut)
    count = tokens = 0
    with ExitStack() as stack:
        stack.callback(stream.close)
        file = stack.enter_context(stack.enter_context(atomic_path(dump)).open("w", encoding="utf-8")) if dump else None
        for conversation in stream:
            _write(file, conversation)
            padding.add(len(conversation.token_ids))
            count, tokens = count + 1, tokens + len(conversation.token_ids)
            if count == limit or (token_limit is not None and tokens >= token_limit):
                break
    report = stream.report()
    return report | {"padding_share": padding.share()}


class _Padding:
    """Padding share of the batches that windows of conversations are cut into."""

    def __init__(self, recipe: Recipe, cut: Cut) -> None:
        self._window_tokens, self._budget = recipe.activations.window_tokens, recipe.corpus.batch_tokens
        on_gpu = "cuda" in recipe.lm.device or (recipe.lm.device == "auto" and torch.cuda.is_available())
        self._cut, self._device = cut, torch.device("cuda" if on_gpu else "cpu")
        self._window: list[int] = []
        self._tokens = 0  # of the window
        self._kept = self._filled = 0

    def add(self, length: int) -> None:
        self._window.append(length)
        self._tokens += length
        if self._tokens >= self._window_tokens:
            self._close()

    def share(self) -> float:
        if self._window:
            self._close()
        return 1 - self._kept / self._filled if self._filled else 0.0

    def _close(self) -> None:
        lengths = self._window
        self._kept += self._tokens
        batches = self._cut(lengths, self._budget, self._device)
        self._filled += sum(len(members) * lengths[members[0]] for members in batches)
        self._window, self._tokens = [], 0


def _write(file: TextIO | None, conversation: Conversation) -> None:
    if file is not None:
        row = {
            "source": conversation.source,
            "messages": conversation.messages,
            "tools": conversation.tools,
            "text": conversation.text,
            "n_tokens": len(conversation.token_ids),
        }
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
