"""BatchTopK against TopK, on rows with known features and on the stand-in's: FVU at equal L0, three seeds.

    python bench/batch_topk.py [--rows 131072] [--cache runs/batch_topk]

Both train by the normalised settings of bench/quality.py at the same rate. On held-out rows BatchTopK's active latents
come from its threshold, so that its L0 is near k there, not k.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

import torch

from qwenscope.lm.sites import Site
from qwenscope.recipe import load_recipe
from qwenscope.sae.sae import SAE
from qwenscope.seeds import derive_seed
from qwenscope.training.trainer import SAETrainer

from quality_data import Data, model_rows, synthetic  # isort: skip

SEEDS = (1, 2, 3)


def train(data: Data, activation: str, seed: int, options: argparse.Namespace) -> SAE:
    """The normalised recipe, once over the rows."""
    steps = len(data.train_RD) // options.batch
    start = SAE(
        data.train_RD.shape[1], options.dict_size, options.k, activation, seed=derive_seed(seed, "bench", "batch_topk")
    )
    trainer = SAETrainer(
        start,
        options.lr,
        tokens=steps * options.batch,
        warmup_tokens=steps * options.batch // 50,
        precision="fp32",
        seed=seed,
        normalise=True,
        betas=(0.9, 0.95),
        decay_share=0.4,
        aux_k=options.k,
    )
    trainer.calibrate(data.train_RD[:50_000])
    for batch in data.train_RD[: steps * options.batch].split(options.batch):
        trainer.step(batch)
    return trainer.sae()


@torch.no_grad()
def held_out(data: Data, sae: SAE) -> tuple[float, float, float]:
    """(FVU, L0, dead share)."""
    x = data.held_out_RD
    codes = sae.encode(x)
    fired = torch.bincount(codes.indices[codes.values > 0], minlength=sae.dict_size)
    fvu = (x - sae.decode(codes)).double().square().sum() / (x - x.mean(0)).double().square().sum()
    return float(fvu), float((codes.values > 0).sum() / len(x)), float((fired == 0).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rows": 131_072, "dim": 128, "features": 512, "dict-size": 512, "k": 8, "batch": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--cache", type=Path, default=Path("runs/batch_topk"), help="keeps the stand-in's rows")
    options = parser.parse_args()
    print("| rows | activation | FVU (three seeds) | mean | L0 held out | dead |\n|---|---|---|---|---|---|")
    options.cache.mkdir(parents=True, exist_ok=True)
    sites = [Site(f"layers.{layer}") for layer in (6, 22, 35)]
    standin = model_rows(load_recipe("standin"), sites, options.rows, 32_768, options.cache)
    known = synthetic(options.rows, options.dim, options.features, options.k, ["sparse", "correlated"])
    for data in itertools.chain(known, standin):
        for activation in ("topk", "batch_topk"):
            found = [held_out(data, train(data, activation, seed, options)) for seed in SEEDS]
            fvu, l0, dead = zip(*found, strict=True)
            seeds = ", ".join(f"{value:.4f}" for value in fvu)
            spread = f"{min(l0):.2f} - {max(l0):.2f}"
            print(
                f"| {data.name} | {activation} | {seeds} | {statistics.mean(fvu):.4f} | {spread} | {max(dead):.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
