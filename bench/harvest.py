"""Rate of harvesting nine hook points through windows, beside the bare truncated and the bare full forward pass.

    python bench/harvest.py [--recipe standin] [--tokens N] [--rounds R] [--device cpu] [--dtype float32] ...

Prints one JSON object. The contestants take turns on the same generated conversations, in the same batches and one
process:

    full        all layers, final norm, LM head (logits of every position, as a plain forward pass computes them)
    decoder     all layers and final norm
    truncated   layers 0 to the last hook point
    harvest     `Windows.next_batch` to the last row: truncated passes; rows gathered, filtered, shuffled, batched
    vllm        with --vllm: the rows at all hook points by vLLM, which computes all layers

Rates are kept (unpadded) tokens per second of process CPU time on a CPU and of wall time on CUDA, medians over rounds;
ratios are medians of the rounds' own ratios: many short rounds, so that a busy machine slows all contestants alike.
`flops_saved` counts matrix products with torch's FlopCounterMode, `time_saved` is what the clock says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from qwenscope.activations.windows import Windows
from qwenscope.corpus.batches import Batch, make_batches
from qwenscope.corpus.chat import Conversation
from qwenscope.corpus.stream import CorpusStream
from qwenscope.lm.forward import final_hidden, logits, residual_streams
from qwenscope.lm.load import LanguageModel, load_language_model
from qwenscope.lm.vllm_engine import VllmModel, vllm_version
from qwenscope.recipe import Recipe, load_recipe


class Replay:
    """The drawn conversations as a stream, so that only the language model's part of the walk is on the clock."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self._conversations, self._next = conversations, 0

    def __next__(self) -> Conversation:
        if self._next == len(self._conversations):
            raise StopIteration
        self._next += 1
        return self._conversations[self._next - 1]

    def state(self) -> dict[str, Any]:
        return {"next": self._next}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="standin", help="whose hook points, batches and windows are used")
    parser.add_argument("--model", help="instead of the recipe's lm.model")
    parser.add_argument("--tokens", type=int, default=2500)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--window-tokens", type=int, default=2500)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vllm", action="store_true", help="in an environment that has it")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    overrides = [f"lm.device={options.device}", f"lm.dtype={options.dtype}"]
    overrides += [f"activations.window_tokens={options.window_tokens}"]
    overrides += [f"lm.model={options.model}"] * bool(options.model)
    recipe = load_recipe(options.recipe, overrides)

    full = load_language_model(recipe.lm, lm_head=True)
    truncated = load_language_model(recipe.lm, last_layer=recipe.layers[-1])
    conversations = draw(recipe, full, options.tokens)
    batches = in_windows(conversations, recipe)
    contestants: dict[str, Callable[[], Any]] = {
        "full": lambda: each(batches, lambda ids_CT: logits(full, final_hidden(full, ids_CT))),
        "decoder": lambda: each(batches, lambda ids_CT: final_hidden(full, ids_CT)),
        "truncated": lambda: each(batches, lambda ids_CT: residual_streams(truncated, ids_CT, recipe.layers[-1:])),
        "harvest": lambda: consume(Windows(truncated, Replay(conversations), recipe), recipe),  # type: ignore[arg-type]
    }
    if options.vllm:
        sizes = {"max_length": recipe.corpus.max_length, "batch_tokens": recipe.corpus.batch_tokens}
        engine = VllmModel(recipe.lm, recipe.layers, **sizes, weights="")
        contestants["vllm"] = lambda: [
            engine.streams(batch.input_ids_CT, batch.lengths_C, recipe.layers) for batch in batches
        ]
    tokens = sum(len(conversation.token_ids) for conversation in conversations)
    seconds = take_turns(contestants, options.rounds, full.device)
    flops = {name: count_flops(contestants[name]) for name in ("full", "decoder", "truncated")}
    result = {
        "model": recipe.lm.model,
        "device": str(full.device),
        "dtype": options.dtype,
        "threads": options.threads,
        "torch": torch.__version__,
        "hook_points": len(recipe.layers),
        "layers": {"full": len(full.layers), "truncated": len(truncated.layers)},
        "tokens": tokens,
        "padding_share": round(1 - tokens / sum(batch.input_ids_CT.numel() for batch in batches), 4),
        "rounds": options.rounds,
        "tokens_per_s": {name: round(tokens / statistics.median(times)) for name, times in seconds.items()},
        "harvest_over_truncated": ratio(seconds, "truncated", "harvest"),
        "saved_against_decoder": saved(seconds, flops, "decoder"),
        "saved_against_full": saved(seconds, flops, "full"),
    }
    if options.vllm:
        result |= {"vllm": vllm_version(), "vllm_over_truncated": ratio(seconds, "truncated", "vllm")}
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def draw(recipe: Recipe, lm: LanguageModel, tokens: int) -> list[Conversation]:
    """Conversations of the recipe's corpus that hold at least `tokens` tokens."""
    stream = CorpusStream(recipe.corpus, lm.tokenizer, seed=recipe.seed)
    drawn: list[Conversation] = []
    while sum(len(conversation.token_ids) for conversation in drawn) < tokens:
        drawn.append(next(stream))
    stream.close()
    return drawn


def in_windows(conversations: Sequence[Conversation], recipe: Recipe) -> list[Batch]:
    """The very batches that the windows will be harvested in."""
    batches: list[Batch] = []
    window: list[Conversation] = []
    for conversation in conversations:
        window.append(conversation)
        filled = sum(len(one.token_ids) for one in window) >= recipe.activations.window_tokens
        if filled or conversation is conversations[-1]:
            ids = [one.token_ids for one in window]
            batches += make_batches([len(row) for row in ids], ids, recipe.corpus.batch_tokens, 0)
            window = []
    return batches


def each(batches: Sequence[Batch], run: Callable[[torch.Tensor], Any]) -> None:
    """One pass per batch; no result is kept, so that nobody pays for fresh memory."""
    for batch in batches:
        run(batch.input_ids_CT)


def consume(windows: Windows, recipe: Recipe) -> None:
    while len(windows.next_batch(recipe.training.batch_size)[recipe.layers[0]]):
        pass


def take_turns(contestants: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(clock() - start)
    return {name: times[1:] for name, times in seconds.items()}


def count_flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    pairs = zip(seconds[above], seconds[below], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 4)


def saved(seconds: dict[str, list[float]], flops: dict[str, int], whole: str) -> dict[str, float]:
    return {
        "flops_saved": round(1 - flops["truncated"] / flops[whole], 4),
        "time_saved": round(1 - ratio(seconds, "truncated", whole), 4),
    }


if __name__ == "__main__":
    main()
