"""Time training steps on a CUDA device: eager and as a CUDA graph, beside the bfloat16 product, and nine SAEs in turn.

    python bench/gpu.py --json bench/results/gpu.json
    python bench/gpu.py --peer saelens=ENV/bin/python --peer sparsify=ENV/bin/python \
        --peer dictionary_learning=ENV/bin/python --json bench/results/gpu.json

Medians of CUDA event times in milliseconds and ratios to one bfloat16 product `x @ W_enc.T` of the same shape; memory
is the allocator's peak beyond what was held before an eager step. The nine SAEs are the published suite's sizes, on one
batch. Each peer runs in a process and an environment of its own, one after another on the same card, with TF32 products
allowed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from step import HIDDEN, PEERS, FirstImplementation, dead_latents, make_rows

SHAPES = ((16384, 64), (16384, 96), (8192, 128))
SUITE = 2 * [(8192, 128)] + 2 * [(16384, 96)] + 5 * [(16384, 64)]


def milliseconds(call: Callable[[], Any], repeats: int = 30) -> float:
    """Median device time of one call, after five to warm up."""
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def graphed(trainer: Any, x: torch.Tensor) -> Callable[[], None]:
    """The device's part of a step, captured on a side stream as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            trainer.step(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        trainer.device_step(x)
    replay: Callable[[], None] = graph.replay
    return replay


def waits(trainer: Any, x: torch.Tensor) -> str | None:
    """What in a step's device part would synchronise host and device, as torch reports it; None where nothing does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            trainer.device_step(x)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def make_trainer(latents: int, k: int, x: torch.Tensor) -> Any:
    """Our trainer in bfloat16 on the device."""
    from qwenscope.sae.sae import TopKSAE
    from qwenscope.training.trainer import SAETrainer

    trainer = SAETrainer(TopKSAE(HIDDEN, latents, k, seed=0).to(x.device), 1e-4, precision="bf16")
    trainer.calibrate(x)
    return trainer


def shape_result(latents: int, k: int, x: torch.Tensor, names: list[str]) -> dict[str, Any]:
    """Floors, our step eager and graphed, and the named others, for one shape."""
    weight = torch.randn(latents, HIDDEN, device=x.device) / HIDDEN**0.5
    a, b = x.bfloat16(), weight.bfloat16()
    result: dict[str, Any] = {"latents": latents, "k": k, "bf16 product": milliseconds(lambda: a @ b.T)}
    calls: dict[str, Callable[[], Any]] = {}
    if "ours" in names:
        trainer = make_trainer(latents, k, a)
        calls = {"ours": lambda: trainer.step(a), "ours, graph": graphed(trainer, a)}
        result["waits for the device"] = waits(trainer, a)
    dead = dead_latents(latents, 0.0).to(x.device)
    for name in names:
        if name == "first":
            calls[name] = partial(FirstImplementation(latents, k).to(x.device).step, x, dead)
        elif name != "ours":
            calls[name] = partial(PEERS[name](latents, k, dead, "cuda"), x)
    for name, call in calls.items():
        time = milliseconds(call)
        result[name] = {"milliseconds": time, "per_bf16_product": time / result["bf16 product"]}
        if name != "ours, graph":  # a graph's memory is held from its capture on
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            result[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return result


def add_peer(result: dict[str, Any], name: str, python: str, batch: int) -> None:
    """Time a peer in its own environment and put it beside ours, shape by shape."""
    command = [python, __file__, "--trainer", name, "--batch", str(batch)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    theirs = json.loads(output[output.index("{\n") :])  # peers may print other lines first
    assert theirs["device"] == result["device"]
    for shape, their_shape in zip(result["shapes"], theirs["shapes"], strict=True):
        shape[name] = their_shape[name]


def best_peer(shape: dict[str, Any], ours: str) -> float:
    """How many times faster `ours` is than the fastest of the others."""
    others = [value["milliseconds"] for name, value in shape.items() if name in PEERS or name == "first"]
    return min(others) / float(shape[ours]["milliseconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--trainer", action="append", choices=["ours", "first", *PEERS])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: bench/step.py times the step on a CPU")
    torch.set_float32_matmul_precision("high")
    names = options.trainer or ["ours"]
    x = make_rows(options.batch).cuda()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "batch": options.batch,
        "shapes": [],
    }
    for latents, k in SHAPES:
        result["shapes"].append(shape_result(latents, k, x, names))
        write(result, options.json)
    if "ours" in names:
        from qwenscope.training.graph import GraphedSteps

        rows = x.bfloat16()
        trainers = [make_trainer(latents, k, rows) for latents, k in SUITE]
        result["nine SAEs"] = milliseconds(lambda: [trainer.step(rows) for trainer in trainers])
        steps = GraphedSteps({str(place): trainer for place, trainer in enumerate(trainers)})
        batch = dict.fromkeys(map(str, range(len(trainers))), rows)
        steps(batch)  # as it is; the next one is captured
        result["nine SAEs, graph"] = milliseconds(lambda: steps(batch))
    for peer in options.peer:
        name, _, python = peer.partition("=")
        add_peer(result, name, python, options.batch)
    for shape in result["shapes"]:
        if "ours" in shape and any(name in shape for name in ("first", *PEERS)):
            shape["times faster than the best peer"] = {
                ours: best_peer(shape, ours) for ours in ("ours", "ours, graph")
            }
    write(result, options.json)
    print(json.dumps(result, indent=2))


def write(result: dict[str, Any], path: Path | None) -> None:
    """Keep what is known so far."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
