"""Plans against runs: what `qwenscope plan` says of small configurations on this CPU, and what their runs do.

    python bench/planned.py --json bench/results/planned.json              about five minutes on a quiet machine
    python bench/planned.py --cpu-time --only standin --only one_sae       on a shared one

Each configuration is planned by the probe, trained, and planned once more, each in a process of its own with one thread
per operator; `two_ranks` runs under torchrun. Prints one JSON object: per configuration what was planned (the middle of
the plan's range, the mean of both), what was measured, and their ratio measured / planned, for tokens per second (of
training alone: no loading, calibration or saving), seconds of the whole run from the call of `train`, and the largest
process's peak memory.

`--cpu-time` compares CPU time, which neighbours on a machine disturb less than the clock: of harvest and SAE steps
together, although they run side by side, and of the busiest rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qwenscope.lm.load import load_tokenizer
from qwenscope.planning import measure as measuring
from qwenscope.planning.plan import plan, read_config
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.training.run import train
from qwenscope.training.trainer import SAETrainer

SHORT = ["activations.window_tokens=16384", "training.tokens=46000", "training.calibration_tokens=8192"]
SHORT += ["training.dead_after_tokens=1000000"]
"""Every run ends in its third window: so early most latents would count as dead, which a plan does not expect."""


def tiny_llama(folder: Path) -> Path:
    """Random weights in eight layers 256 wide, with the stand-in's tokenizer."""
    tokenizer = load_tokenizer(load_recipe("standin").lm)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_saes(recipe: Recipe, saes: dict[str, tuple[int, int, int]]) -> Recipe:
    """{id: (layer, dict_size, k)} in place of the recipe's SAEs."""
    lr = next(iter(recipe.hook_points.values())).lr
    tree = recipe.model_dump(mode="json")
    tree["hook_points"] = {
        sae_id: {"layer": layer, "dict_size": size, "k": k, "lr": lr} for sae_id, (layer, size, k) in saes.items()
    }
    return Recipe.model_validate(tree)


def configurations(folder: Path) -> dict[str, Callable[[], Recipe]]:
    """What is planned and run, by name."""

    def standin(*overrides: str) -> Recipe:
        return load_recipe("standin", ["training.warmup_steps=10", *overrides])

    layers = sorted({point.layer for point in standin().hook_points.values()})
    llama = [f"lm.model={folder / 'models' / 'llama'}", "corpus.max_length=512", *SHORT]
    return {
        "standin": lambda: standin("training.tokens=95000"),
        "wide_plain": lambda: with_saes(
            standin("training.normalise=false", "training.batch_size=1024", "training.aux_k=32", *SHORT),
            {f"sae_{layer}": (layer, 4096, 32) for layer in layers},
        ),
        "one_sae": lambda: with_saes(standin(*SHORT), {"sae": (22, 2048, 16)}),
        "eighteen_saes": lambda: with_saes(
            standin(*SHORT), {f"sae_{layer}_{n}": (layer, n, 8) for layer in layers for n in (256, 1024)}
        ),
        "llama": lambda: with_saes(
            load_recipe("standin", [*llama, "training.warmup_steps=10"]),
            {f"sae_{layer}": (layer, 4096, 32) for layer in (1, 3, 5, 7)},
        ),
        "two_ranks": lambda: standin(*SHORT),
    }


# -- in processes of their own ----------------------------------------------------------------------------------------


def planned(recipe: Recipe, ranks: int, cpu_time: bool) -> dict[str, float]:
    """The plan's middle."""
    if cpu_time:
        measuring._now = lambda device: time.thread_time()
    found = measuring.measure(recipe, read_config(recipe))
    if cpu_time:
        found = dataclasses.replace(found, lanes=1)
    report = plan(recipe, gpus=ranks, measured=found)
    tokens, batch = recipe.training.tokens, recipe.training.batch_size
    parts = {name: sum(ends) / 2 for name, ends in report["seconds_once"].items()}
    training = sum(report["seconds_per_step"]["step"]) / 2 * tokens / batch + parts["part_windows"]
    return {
        "tokens_per_second": tokens / training,
        "seconds": training + parts["load_model"] + parts["calibration"] + parts["last_save"],
        "load_seconds": parts["load_model"],
        "calibration_seconds": parts["calibration"],
        "saving_seconds": parts["last_save"],
        "memory_mb": report["memory_total_bytes"] / 1e6,
    }


def trained(recipe: Recipe, out: Path, cpu_time: bool) -> dict[str, float]:
    """A run, timed by its phases."""
    clock, own_clock = (time.process_time, time.thread_time) if cpu_time else (time.perf_counter, time.perf_counter)
    began: dict[str, float] = {}
    calibration_seconds = 0.0
    calibrate = SAETrainer.calibrate

    def timed(self: SAETrainer, rows_RD: torch.Tensor) -> None:
        nonlocal calibration_seconds
        start = own_clock()
        calibrate(self, rows_RD)
        calibration_seconds += own_clock() - start

    SAETrainer.calibrate = timed  # type: ignore[method-assign]
    start = clock()
    train(recipe, out, on_progress=lambda progress: began.setdefault(progress.phase, clock()) and None)
    seconds = clock() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    if not began:  # not rank 0
        return {"seconds": seconds, "memory_mb": memory}
    training = began["saving"] - began["calibrating"] - calibration_seconds
    return {
        "tokens_per_second": recipe.training.tokens / training,
        "seconds": seconds,
        "load_seconds": began["calibrating"] - start,
        "calibration_seconds": calibration_seconds,
        "saving_seconds": start + seconds - began["saving"],
        "memory_mb": memory,
    }


def child(act: str, recipe: Path, ranks: int, cpu_time: bool, out: Path) -> None:
    """What the process is for, noted in `out` under its rank."""
    torch.set_num_threads(1)
    loaded = load_recipe(recipe)
    found = planned(loaded, ranks, cpu_time) if act == "plan" else trained(loaded, out / "run", cpu_time)
    (out / f"{act}.{os.environ.get('RANK', '0')}.{os.getpid()}.json").write_text(json.dumps(found))


# -- the comparison ---------------------------------------------------------------------------------------------------


def compare(name: str, recipe: Recipe, folder: Path, cpu_time: bool) -> dict[str, Any]:
    """Plan, train, plan again, and set side by side."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    ranks = 2 if name == "two_ranks" else 1
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    for act in ("plan", "train", "plan"):
        command = [sys.executable, *(launcher if act == "train" else []), __file__, "--child", act, str(folder)]
        command += ["--ranks", str(ranks), *(["--cpu-time"] if cpu_time else [])]
        subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
    plans, runs = (
        [json.loads(path.read_text()) for path in sorted(folder.glob(f"{act}.*.json"))] for act in ("plan", "train")
    )
    measured = runs[0] | {key: max(run[key] for run in runs) for key in ("seconds", "memory_mb")}
    middle = {figure: sum(one[figure] for one in plans) / len(plans) for figure in plans[0]}
    figures = ("tokens_per_second", "seconds", "memory_mb")
    ratio = {figure: round(measured[figure] / middle[figure], 3) for figure in figures}
    return {"planned": middle, "measured": measured, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="these configurations; again for more")
    parser.add_argument("--cpu-time", action="store_true", help="compare CPU time instead of the clock's")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    parser.add_argument("--child", nargs=2, metavar=("ACT", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        act, folder = options.child[0], Path(options.child[1])
        return child(act, folder / "recipe.yaml", options.ranks, options.cpu_time, folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny_llama(folder / "models" / "llama")
        found = {
            name: compare(name, make(), folder / name, options.cpu_time)
            for name, make in configurations(folder).items()
            if options.only is None or name in options.only
        }
    ratios = [ratio for one in found.values() for ratio in one["ratio"].values()]
    result = {
        "clock": "CPU time" if options.cpu_time else "wall clock",
        "torch": torch.__version__,
        "configurations": found,
        "least_ratio": min(ratios),
        "largest_ratio": max(ratios),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
