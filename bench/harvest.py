"""Rate of harvesting nine hook points through windows, beside bare forward passes and beside SAE steps.

    python bench/harvest.py [--recipe standin] [--set KEY=VALUE] [--tokens N] [--rounds R] [--dtype float32] ...

Prints one JSON object. The contestants take turns on the same generated conversations, in the same batches and one
process:

    plain       transformers' own call, model(input_ids): all layers, logits of every position, and a cache, by default
    full        the same without the cache: all layers, final norm, LM head
    decoder     all layers and final norm
    truncated   layers 0 to the last hook point
    harvest     `Windows.next_batch` to the last row: truncated passes; rows gathered, filtered, shuffled, batched
    steps       one step of every SAE on each of those batches, alone
    in_turn     harvest and steps with activations.overlap=false
    overlapped  the same with activations.overlap=true: the next window in a thread of its own, beside the steps
    vllm        with --vllm: the rows at all hook points by vLLM, which computes all layers

Rates are kept (unpadded) tokens per second of process CPU time on a CPU and of wall time on CUDA, medians over rounds;
ratios are medians of the rounds' own ratios: many short rounds, so that a busy machine slows all contestants alike.
`flops_saved` counts matrix products with torch's FlopCounterMode, `time_saved` is what the clock says.

`harvest_beside_steps` is the harvest thread's own time in `overlapped`, steps excluded, as a rate over `truncated`'s:
by CPU seconds (which do not see waiting) and by wall seconds (which see the other thread, and the machine's other
users). `overlap` compares wall seconds: it needs two idle cores, or a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from qwenscope.activations.source import WindowSource
from qwenscope.activations.windows import Windows
from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.stream import CorpusStream
from qwenscope.lm.batches import Batch, make_batches
from qwenscope.lm.forward import final_hidden, logits, site_rows
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site, sites_of
from qwenscope.lm.vllm.engine import VllmModel, vllm_version
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.training.building import build_trainer

Seconds = dict[str, list[float]]

OVERLAP = ("harvest", "steps", "in_turn", "overlapped")


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
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes the recipe")
    parser.add_argument("--tokens", type=int, default=7500)
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
    recipe = load_recipe(options.recipe, [*overrides, *options.set])

    full = load_language_model(recipe.lm, lm_head=True)
    truncated = load_language_model(recipe.lm, last_layer=recipe.last_layer)
    conversations = draw(recipe, full, options.tokens)
    batches = in_windows(conversations, recipe)
    tokens = sum(len(conversation.token_ids) for conversation in conversations)
    steps = Steps(recipe, truncated, conversations)
    thread: Seconds = {"cpu": [], "wall": []}
    contestants: dict[str, Callable[[], Any]] = {
        "plain": lambda: each(batches, lambda ids_CT: full.model(ids_CT.to(full.device))),
        "full": lambda: each(batches, lambda ids_CT: logits(full, final_hidden(full, ids_CT))),
        "decoder": lambda: each(batches, lambda ids_CT: final_hidden(full, ids_CT)),
        "truncated": lambda: each(batches, lambda ids_CT: site_rows(truncated, ids_CT, sites_of(recipe)[-1:])),
        "harvest": lambda: steps.walk(overlap=False, train=False),
        "steps": steps.alone,
        "in_turn": lambda: steps.walk(overlap=False),
        "overlapped": lambda: steps.walk(overlap=True, thread=thread),
    }
    if options.vllm:
        sizes = {"max_length": recipe.corpus.max_length, "batch_tokens": recipe.corpus.batch_tokens}
        engine = VllmModel(recipe.lm, sites_of(recipe), **sizes, weights="")
        contestants["vllm"] = lambda: [
            engine.streams(batch.input_ids_CT, batch.lengths_C, sites_of(recipe)) for batch in batches
        ]
    cpu, wall = take_turns(contestants, options.rounds, full.device)
    seconds = wall if full.device.type == "cuda" else cpu
    flops = {name: count_flops(contestants[name]) for name in ("plain", "full", "decoder", "truncated")}
    result = {
        "model": recipe.lm.model,
        "device": str(full.device),
        "dtype": options.dtype,
        "threads": options.threads,
        "torch": torch.__version__,
        "hook_points": len(recipe.sites),
        "layers": {"full": len(full.layers), "truncated": len(truncated.layers)},
        "tokens": tokens,
        "padding_share": round(1 - tokens / sum(batch.input_ids_CT.numel() for batch in batches), 4),
        "rounds": options.rounds,
        "tokens_per_s": {name: round(tokens / statistics.median(times)) for name, times in seconds.items()},
        "harvest_over_truncated": ratio(seconds, "truncated", "harvest"),
        "harvest_beside_steps_over_truncated": {
            clock: ratio({"bare": bare["truncated"], "thread": thread[clock][1:]}, "bare", "thread")
            for clock, bare in (("cpu", cpu), ("wall", wall))
        },
        "in_turn_over_truncated": ratio(seconds, "truncated", "in_turn"),
        "overlap": {
            "wall_seconds": {name: round(statistics.median(wall[name]), 3) for name in OVERLAP},
            "in_turn_over_overlapped": ratio(wall, "in_turn", "overlapped"),
        },
        "saved_against_decoder": saved(seconds, flops, "decoder"),
        "saved_against_full": saved(seconds, flops, "full"),
        "saved_against_plain": saved(seconds, flops, "plain"),
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
            batches += make_batches([len(row) for row in ids], ids, recipe.corpus.batch_tokens, 0, torch.device("cpu"))
            window = []
    return batches


def each(batches: Sequence[Batch], run: Callable[[torch.Tensor], Any]) -> None:
    """One pass per batch; no result is kept, so that nobody pays for fresh memory."""
    for batch in batches:
        run(batch.input_ids_CT)


class Steps:
    """All SAEs of a recipe, to be trained on the conversations' windows over and over."""

    def __init__(self, recipe: Recipe, lm: LanguageModel, conversations: Sequence[Conversation]) -> None:
        self._recipe, self._lm, self._conversations = recipe, lm, conversations
        precision = "fp32" if lm.device.type == "cpu" else recipe.training.precision  # auto would time products
        self._trainers = {sae_id: build_trainer(recipe, lm, sae_id, precision) for sae_id in recipe.hook_points}
        with closing(self._windows(overlap=False)) as windows:
            rows = windows.calibration_rows()
            for sae_id, trainer in self._trainers.items():
                trainer.calibrate(rows[Site(recipe.hook_points[sae_id].site)])
            self._batches = list(self._each_batch(windows))

    def alone(self) -> None:
        for batch in self._batches:
            self._step(batch)

    def walk(self, overlap: bool, train: bool = True, thread: Seconds | None = None) -> None:
        """Harvest everything, and train on it; the time spent in making windows is added to `thread`."""
        with making_timed(thread or {"cpu": [], "wall": []}), closing(self._windows(overlap)) as windows:
            for batch in self._each_batch(windows):
                if train:
                    self._step(batch)

    def _step(self, batch: dict[int, torch.Tensor]) -> None:
        for sae_id, trainer in self._trainers.items():
            trainer.step(batch[Site(self._recipe.hook_points[sae_id].site)])

    def _windows(self, overlap: bool) -> Windows:
        changes: dict[str, Any] = {"overlap": overlap}
        recipe = self._recipe.model_copy(update={"activations": self._recipe.activations.model_copy(update=changes)})
        return Windows(self._lm, Replay(self._conversations), recipe)  # type: ignore[arg-type]

    def _each_batch(self, windows: Windows) -> Iterator[dict[int, torch.Tensor]]:
        while len((batch := windows.next_batch(self._recipe.training.batch_size))[sites_of(self._recipe)[0]]):
            yield batch


@contextmanager
def making_timed(thread: Seconds) -> Iterator[None]:
    """Add the seconds of the thread that makes windows, all of them together."""
    make, cpu, wall = WindowSource.window, [0.0], [0.0]

    def timed(self: WindowSource, index: int, cursor: dict[str, Any]) -> Any:
        start = time.thread_time(), time.perf_counter()
        window = make(self, index, cursor)
        cpu.append(time.thread_time() - start[0])
        wall.append(time.perf_counter() - start[1])
        return window

    with patch.object(WindowSource, "window", timed):
        yield
    thread["cpu"].append(sum(cpu))
    thread["wall"].append(sum(wall))


def take_turns(contestants: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> tuple[Seconds, Seconds]:
    """CPU and wall seconds of each contestant in each round, after one round that is not counted."""
    cpu: Seconds = {name: [] for name in contestants}
    wall: Seconds = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = time.process_time(), time.perf_counter()
            with torch.no_grad():
                run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            cpu[name].append(time.process_time() - start[0])
            wall[name].append(time.perf_counter() - start[1])
    return {name: times[1:] for name, times in cpu.items()}, {name: times[1:] for name, times in wall.items()}


def count_flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def ratio(seconds: Seconds, above: str, below: str) -> float:
    pairs = zip(seconds[above], seconds[below], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 4)


def saved(seconds: Seconds, flops: dict[str, int], whole: str) -> dict[str, float]:
    return {
        "flops_saved": round(1 - flops["truncated"] / flops[whole], 4),
        "time_saved": round(1 - ratio(seconds, "truncated", whole), 4),
    }


if __name__ == "__main__":
    main()
