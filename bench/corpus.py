"""Throughput of the corpus room (read, filter, render, tokenise, roles, batch) beside the bare tokenizer's own.

    python bench/corpus.py DATA --tokenizer FOLDER [--kind files|wildchat] [--conversations N] [--workers N]

DATA is a file or folder of conversations (or of WildChat rows). Prints one JSON object. Rates are rendered tokens
(before truncation) per second of this process's CPU time on the same text, the best of rounds in which the two take
turns (neighbours on a machine only ever slow it down). With --workers, the wall-clock rate through worker processes
stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one core each

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.stream import CorpusStream
from qwenscope.lm.batches import make_batches
from qwenscope.recipe import CorpusRecipe, SourceRecipe

WINDOW_TOKENS = 131_072


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--kind", choices=("files", "wildchat"), default="files")
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    corpus = CorpusRecipe(sources=(SourceRecipe(name=options.kind, path=options.data, weight=1),))

    conversations = stream(corpus, tokenizer, options.conversations)  # warms up: tables, compiled template, file cache
    texts = [conversation.text for conversation in conversations]
    tokens = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    bare, room, batching = [], [], []
    for _ in range(options.rounds):
        start = time.process_time()
        tokenizer(texts, add_special_tokens=False)
        bare.append(tokens / (time.process_time() - start))
        start = time.process_time()
        conversations = stream(corpus, tokenizer, options.conversations)
        streamed = time.process_time() - start
        padding = batch(conversations, corpus.batch_tokens)
        room.append(tokens / (time.process_time() - start))
        batching.append((time.process_time() - start - streamed) / (time.process_time() - start))
    result = {
        "conversations": len(conversations),
        "tokens": tokens,
        "kept_tokens": sum(len(conversation.token_ids) for conversation in conversations),
        "bare_tokens_per_s": round(max(bare)),
        "room_tokens_per_s": round(max(room)),
        "ratio": round(max(room) / max(bare), 3),
        "batching_share": round(min(batching), 3),
        "padding_share": round(padding, 4),
    }
    if options.workers:
        start = time.perf_counter()
        stream(corpus, tokenizer, options.conversations, options.workers)
        result["workers"] = options.workers
        result["workers_wall_tokens_per_s"] = round(tokens / (time.perf_counter() - start))
    print(json.dumps(result))


def stream(
    corpus: CorpusRecipe, tokenizer: PreTrainedTokenizerBase, count: int, workers: int = 0
) -> list[Conversation]:
    """The first `count` conversations, from a fresh stream."""
    source = CorpusStream(corpus, tokenizer, seed=0, workers=workers)
    conversations = [conversation for _, conversation in zip(range(count), source, strict=False)]
    source.close()
    return conversations


def batch(conversations: list[Conversation], budget: int) -> float:
    """Batch window by window, as a harvest does; returns the padding share."""
    kept = filled = 0
    window: list[Conversation] = []
    for position, conversation in enumerate(conversations):
        window.append(conversation)
        lengths = [len(member.token_ids) for member in window]
        if sum(lengths) >= WINDOW_TOKENS or position == len(conversations) - 1:
            batches = make_batches(lengths, [member.token_ids for member in window], budget, 0, torch.device("cpu"))
            kept += sum(lengths)
            filled += sum(made.input_ids_CT.numel() for made in batches)
            window = []
    return 1 - kept / filled


if __name__ == "__main__":
    main()
