"""What Matryoshka prefixes add to a step: CPU seconds per step of plain and nested training, steps taken in turn.

    OMP_NUM_THREADS=1 python bench/nested.py [--steps 12]

Ratios are of medians in one process, on random rows; sizes as printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from qwenscope.sae.sae import TopKSAE
from qwenscope.training.trainer import SAETrainer

SIZES = ((512, 4096, 32, 512), (1024, 8192, 32, 512))
"""D, N, K, rows of a batch."""


def prefixes(latents: int, count: int) -> list[int]:
    """That many nested dictionaries, each twice as large as the one before; the last is the whole."""
    return [latents >> step for step in reversed(range(count))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    print("| d | n | k | batch | prefixes | CPU ms per step | ratio |\n|---|---|---|---|---|---|---|")
    for hidden, latents, k, batch in SIZES:
        sae, x_BD = TopKSAE(hidden, latents, k, seed=0), torch.randn(batch, hidden)
        options = {"precision": "fp32", "aux_coefficient": 0.0}
        trainers = {
            count: SAETrainer(sae, 1e-4, prefixes=prefixes(latents, count), **options)  # type: ignore[arg-type]
            for count in (1, 3, 5)
        }
        taken: dict[int, list[float]] = {count: [] for count in trainers}
        for _ in range(steps + 2):
            for count, trainer in trainers.items():
                begin = time.process_time()
                trainer.step(x_BD)
                taken[count].append(time.process_time() - begin)
        medians = {count: statistics.median(seconds[2:]) for count, seconds in taken.items()}
        for count, median in medians.items():
            size = f"| {hidden} | {latents:,} | {k} | {batch} | {count}"
            print(f"{size} | {1000 * median:.0f} | {median / medians[1]:.2f} |")


if __name__ == "__main__":
    main()
