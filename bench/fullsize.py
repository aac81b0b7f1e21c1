"""The real sizes end to end, with random weights: harvest of nine hook points and nine SAE trainers, as a run does it.

    python bench/fullsize.py --json bench/results/fullsize.json                  on a GPU of 80 GB or more
    python bench/fullsize.py --set corpus.batch_tokens=8192 --seconds 300        as an 80 GB card needs it
    python bench/fullsize.py --reduced                                           the same walk in seconds on a CPU

The language model has the published model's configuration up to the last hooked layer (30.8B parameters, made on the
device; nothing is downloaded); conversations are random token ids with lengths like real ones. Windows, harvest and
trainers are those of `qwenscope train`. One window warms up, then whole windows are timed until --seconds have passed:
first harvest and steps in turns, so that each phase has a time of its own, then, unless the recipe says
`activations.overlap=false`, side by side (`tokens_per_s_overlapped`).

Prints one JSON object, and keeps the --json file up to date after each phase. Phases are timed by CUDA events (on a CPU
by the clock): `language_model` is the truncated forward alone, `sae_steps` all trainers' steps, `other` the rest:
drawing, filtering, shuffling, gathering, waiting. MFU = FLOPs per token x tokens / forward seconds / the card's dense
bf16 peak, where FLOPs per token = 2 x active weights + 8 x DeltaNet state, per layer; padding counts as lost. Without a
data sheet the peak is a measured product.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from standin.model import standin_config
from torch import nn
from transformers import AutoModel, PretrainedConfig, Qwen3_5MoeTextConfig

from qwenscope.activations.windows import Windows
from qwenscope.corpus.conversation import Conversation
from qwenscope.costs import GPUS, named_card
from qwenscope.doctor import examine
from qwenscope.lm.load import layer_kinds, pick_dtype
from qwenscope.lm.model import LanguageModel, cut_config, decoder_layers
from qwenscope.lm.placement import pick_devices
from qwenscope.lm.sites import Site
from qwenscope.planning.measure import product_tflops
from qwenscope.planning.plan import model_size
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.training.building import build_trainer
from qwenscope.training.trainer import SAETrainer

FULL = {
    "vocab_size": 248_320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
"""Qwen3.5-35B-A3B's text model."""

REDUCED = ["lm.device=cpu", "corpus.max_length=256", "corpus.batch_tokens=1024", "activations.window_tokens=1024"]
REDUCED += ["training.batch_size=256", "training.calibration_tokens=512"]


class RandomConversations:
    """An endless stream of random token ids; lengths are log-normal (median 550 tokens, mean about 750) and cut off."""

    def __init__(self, vocabulary: int, max_length: int, seed: int) -> None:
        self._vocabulary, self._max_length, self._seed = vocabulary, max_length, seed
        self._next = 0

    def __next__(self) -> Conversation:
        random = np.random.default_rng([self._seed, self._next])
        length = int(np.clip(random.lognormal(np.log(550), 0.8), 16, self._max_length))
        ids = random.integers(0, self._vocabulary, length, dtype=np.int32)
        self._next += 1
        return Conversation(
            f"{self._next:016x}", "random", "chat", ids, np.zeros(length, np.uint8), False, [], None, ""
        )

    def state(self) -> dict[str, Any]:
        return {"next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


class Stopwatch:
    """Sums the device's time between `start` and `stop`, without making the host wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Start, or stop if started."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> float:
        """Since the last call; on a GPU after a synchronisation."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        self._marks.clear()
        if self._on_gpu:
            return sum(start.elapsed_time(stop) for start, stop in pairs) / 1e3
        return float(sum(stop - start for start, stop in pairs))


@dataclass
class Timed:
    """What the timed windows came to."""

    windows: int = 0
    trained: int = 0
    """Tokens that went through the trainers."""
    harvested: int = 0
    """Tokens that went through the language model."""
    finite: bool = True
    seconds: float = 0.0
    forward: float = 0.0
    steps: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="the stand-in's sizes, on a CPU, a second")
    parser.add_argument("--seconds", type=float, help="time at least so long; 180, or 1 with --reduced")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    if not options.reduced and not torch.cuda.is_available():
        raise SystemExit("no CUDA device for 30.8B parameters: --reduced runs the same walk on a CPU")
    recipe = load_recipe("standin", REDUCED + options.set) if options.reduced else published(options.set)
    config = standin_config(4096) if options.reduced else Qwen3_5MoeTextConfig(**FULL, dtype="bfloat16")
    text = ""
    for result in run(recipe, config, options.seconds or (1.0 if options.reduced else 180.0)):
        text = json.dumps(result, indent=2)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


def published(overrides: list[str]) -> Recipe:
    return load_recipe("qwen3.5-35b-a3b", overrides)


def random_model(recipe: Recipe, config: PretrainedConfig) -> LanguageModel:
    """The model up to the last hooked layer, with random weights made where it runs."""
    device, dtype, depth = pick_devices(recipe.lm.device)[0], pick_dtype(recipe.lm, config), recipe.last_layer + 1
    torch.manual_seed(recipe.seed)
    with device:
        model: Any = AutoModel.from_config(cut_config(config, depth), dtype=dtype)
    model.requires_grad_(False)
    model.train(False)
    layers: list[nn.Module] = decoder_layers(model, depth)
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    return LanguageModel(
        model, tokenizer, layers, layer_kinds(config), config.hidden_size, device, dtype, "random weights", None
    )


def run(recipe: Recipe, config: PretrainedConfig, seconds: float) -> Iterator[dict[str, Any]]:
    """Warm up for one window, time whole windows for `seconds`, and report; what is known, after each phase."""
    lm = random_model(recipe, config)
    known = describe(recipe, lm)
    yield known
    windows = random_windows(lm, recipe, overlap=False)
    trainers = {sae_id: build_trainer(recipe, lm, sae_id, recipe.training.precision) for sae_id in recipe.hook_points}
    rows = windows.calibration_rows()
    for sae_id, trainer in trainers.items():
        trainer.calibrate(rows[Site(recipe.hook_points[sae_id].site)])
    del rows
    forward, steps = Stopwatch(lm.device), Stopwatch(lm.device)
    lm.decoder.register_forward_pre_hook(lambda *_: forward.mark())
    lm.layers[-1].register_forward_hook(lambda *_: forward.mark())  # before the hook that ends the pass there

    train_window(recipe, windows, trainers, steps)
    synchronise(lm.device)
    forward.seconds(), steps.seconds()
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
    timed = Timed()
    read, began = windows.tokens_read, time.perf_counter()
    while time.perf_counter() - began < seconds:
        tokens, finite = train_window(recipe, windows, trainers, steps)
        synchronise(lm.device)
        timed.windows, timed.trained, timed.finite = timed.windows + 1, timed.trained + tokens, timed.finite and finite
    timed.seconds, timed.harvested = time.perf_counter() - began, windows.tokens_read - read
    timed.forward, timed.steps = forward.seconds(), steps.seconds()
    known |= {"precision": sorted({trainer.precision for trainer in trainers.values()})} | report(lm, timed)
    yield known
    del windows  # its window's memory
    side_by_side = overlapped(lm, recipe, trainers, seconds) if recipe.activations.overlap else None
    yield known | {"tokens_per_s_overlapped": side_by_side}


def random_windows(lm: LanguageModel, recipe: Recipe, overlap: bool) -> Windows:
    recipe = recipe.model_copy(update={"activations": recipe.activations.model_copy(update={"overlap": overlap})})
    conversations: Any = RandomConversations(
        len(lm.model.get_input_embeddings().weight), recipe.corpus.max_length, recipe.seed
    )
    return Windows(lm, conversations, recipe)


def overlapped(lm: LanguageModel, recipe: Recipe, trainers: dict[str, SAETrainer], seconds: float) -> float:
    """Tokens per second with the next window harvested beside the steps."""
    with closing(random_windows(lm, recipe, overlap=True)) as windows:
        idle = Stopwatch(lm.device)
        train_window(recipe, windows, trainers, idle)
        synchronise(lm.device)
        tokens, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            tokens += train_window(recipe, windows, trainers, idle)[0]
        synchronise(lm.device)
        return tokens / (time.perf_counter() - began)


def train_window(
    recipe: Recipe, windows: Windows, trainers: dict[str, SAETrainer], steps: Stopwatch
) -> tuple[int, bool]:
    """Batches until the next window begins -> tokens trained, and whether every loss was finite."""
    tokens, flags, index = 0, [], windows.state()["window"]
    while windows.state()["window"] == index:
        batch = windows.next_batch(recipe.training.batch_size)
        steps.mark()
        for sae_id, trainer in trainers.items():
            flags.append(trainer.step(batch[Site(recipe.hook_points[sae_id].site)]).finite)
        steps.mark()
        tokens += recipe.training.batch_size
    return tokens, bool(torch.stack(flags).all())


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(recipe: Recipe, lm: LanguageModel) -> dict[str, Any]:
    """What ran, and on what."""
    return {
        "device": device_name(lm),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "missing": [entry["package"] for entry in examine()["missing"]],
        "saes": {sae_id: f"{point.dict_size}/{point.k}" for sae_id, point in recipe.hook_points.items()},
        "batch_tokens": recipe.corpus.batch_tokens,
        "window_tokens": recipe.activations.window_tokens,
        "batch_size": recipe.training.batch_size,
    }


def report(lm: LanguageModel, timed: Timed) -> dict[str, Any]:
    """Rates, MFU, shares of time and memory."""
    size = model_size(lm.model.config, len(lm.layers))
    known = GPUS.get(named_card(device_name(lm)) or "")
    sheet = known and known.bf16_tflops
    peak = sheet or product_tflops(lm.device, lm.dtype)
    tflops = size.flops_per_token * timed.harvested / timed.forward / 1e12
    shares = {"language_model": timed.forward / timed.seconds, "sae_steps": timed.steps / timed.seconds}
    cuda = lm.device.type == "cuda"
    return {
        "windows": timed.windows,
        "tokens": timed.trained,
        "finite": timed.finite,
        "seconds": timed.seconds,
        "tokens_per_s": timed.trained / timed.seconds,
        "language_model": {
            **asdict(size),
            "tokens_per_s": timed.harvested / timed.forward,
            "tflops": tflops,
            "mfu": tflops / peak,
            "peak_tflops": peak,
            "peak_from": "data sheet, dense bf16" if sheet else "measured product",
        },
        "share_of_time": shares | {"other": 1 - sum(shares.values())},
        "peak_memory_bytes": torch.cuda.max_memory_allocated(lm.device)
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def device_name(lm: LanguageModel) -> str:
    return torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
