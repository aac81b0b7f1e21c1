"""What checkpoints cost: how long training waits, how much steps slow down beside a save, how long a resume takes.

    python bench/checkpoint.py --saes 1 --hidden 2048 --dict-size 16384 --k 64 --batch 1024 --folder /scratch

prints one JSON object. The share of a run is taken at the recipes' ten minutes between saves: by wall clock (wait plus
slow-down of the steps), which is what counts on a GPU and needs an idle machine, and by CPU time (copy plus writing),
which is what a CPU run with no core to spare pays and which other processes do not disturb.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from qwenscope.sae.sae import TopKSAE
from qwenscope.training import checkpoint
from qwenscope.training.saver import Saver
from qwenscope.training.trainer import SAETrainer

CADENCE_SECONDS = 600.0


def main() -> None:
    """Measure, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("saes", 1),
        ("hidden", 2048),
        ("dict-size", 16384),
        ("k", 64),
        ("batch", 1024),
        ("saves", 3),
    ):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--folder", type=Path, default=None, help="on the disk that runs are kept on")
    chosen = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainers = {
        f"sae_{index}": SAETrainer(TopKSAE(chosen.hidden, chosen.dict_size, chosen.k, seed=index).to(device), 1e-4)
        for index in range(chosen.saes)
    }
    rows = torch.randn(chosen.batch, chosen.hidden, device=device)
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="qwenscope-bench-") as name:
        print(json.dumps(measure(trainers, rows, Path(name), chosen.saves) | facts(chosen, device), indent=2))


def measure(trainers: dict[str, SAETrainer], rows_BD: torch.Tensor, folder: Path, saves: int) -> dict[str, float]:
    """Medians over `saves` saves, in seconds; the first, which also allocates the copies, is reported apart."""
    alone = statistics.median([step(trainers, rows_BD) for _ in range(6)][1:])
    saver = Saver(folder, keep=1)
    waits, writes, beside, copying, writing = [], [], [], [], []
    for index in range(saves + 1):
        began, main, every = time.perf_counter(), time.thread_time(), time.process_time()
        saver.save(index, {}, {name: trainer.state_dict() for name, trainer in trainers.items()}, snapshot=False)
        waits.append(time.perf_counter() - began)
        copying.append(time.thread_time() - main)
        while True:
            beside.append(step(trainers, rows_BD))
            if saver.ended():
                break
        writes.append(time.perf_counter() - began)
        writing.append(time.process_time() - every - (time.thread_time() - main))
    newest = checkpoint.list_checkpoints(folder)[-1]
    began, every = time.perf_counter(), time.process_time()
    checkpoint.load(newest)
    load, load_cpu = time.perf_counter() - began, time.process_time() - every
    slower = max(0.0, statistics.median(beside) - alone) * len(beside) / len(writes)
    wait = statistics.median(waits[1:])
    return {
        "bytes": sum(path.stat().st_size for path in newest.iterdir()),
        "wait_first": waits[0],
        "wait": wait,
        "written_after": statistics.median(writes[1:]),
        "step_alone": alone,
        "step_beside_a_save": statistics.median(beside),
        "share_of_run_wall": (wait + slower) / CADENCE_SECONDS,
        "copy_cpu": statistics.median(copying[1:]),
        "write_cpu": statistics.median(writing[1:]),
        "share_of_run_cpu": (statistics.median(copying[1:]) + statistics.median(writing[1:])) / CADENCE_SECONDS,
        "verify_and_load": load,
        "verify_and_load_cpu": load_cpu,
    }


def step(trainers: dict[str, SAETrainer], rows_BD: torch.Tensor) -> float:
    """Seconds of one step of every trainer."""
    began = time.perf_counter()
    for trainer in trainers.values():
        trainer.step(rows_BD)
    if rows_BD.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def facts(chosen: argparse.Namespace, device: str) -> dict[str, object]:
    """What was measured, and on what."""
    return {
        "sizes": {key: value for key, value in vars(chosen).items() if isinstance(value, int)},
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
