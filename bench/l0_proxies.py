"""Do the L0 proxies find the right k? SAEs of several k on rows whose mean L0 is known, and on a model's rows.

    python bench/l0_proxies.py [--seeds 1] [--rows 800000] [--out l0_proxies.json]
    python bench/l0_proxies.py --site-folder runs/quality-smollm2/layers.15 --dict-size 1152 --k 8 --k 16 ...

The known rows: features whose probability of firing falls linearly, so that ten fire on average, with positive
correlations in groups of eight (bench/truth.py's copula); `orthogonal`, 50 features in 64 dimensions, and
`superposed`, 50 in 40, are like the toys of Chanin and Garriga-Alonso 2025 (sections 3.2 and A.4.1), `crowded` has 80
features in 48. As many latents as features. A site's folder is one that bench/quality.py keeps (`rows.pt`,
`held_out.pt`). Every SAE trains by our normalised settings, once over the rows; all figures are of held-out rows.
Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from quality_data import Data
from synth_sae_bench import nearly_orthogonal
from torch import Tensor
from truth import GroundTruth, recovery

from qwenscope.evaluation.fidelity import Fidelity
from qwenscope.evaluation.l0_proxies import DecoderProjections, decoder_pairwise_cosine
from qwenscope.files import write_json
from qwenscope.sae.sae import SAE
from qwenscope.seeds import derive_seed, generator
from qwenscope.training.trainer import SAETrainer

ACTIVE = 10  # features that fire on a row, on average
LAWS = {"orthogonal": (64, 50), "superposed": (40, 50), "crowded": (48, 80)}  # dimensions, features
PARTS = (2, 3, 4, 8)  # s_n_dec is reported with n = N over each of these
KNOWN_K, SITE_K = (6, 8, 9, 10, 11, 12, 14, 18), (8, 16, 32, 64, 128, 256)
BATCH = 512


def directions(hidden_dim: int, features: int) -> Tensor:
    """Unit directions [F, D]: orthonormal where they fit, else with their cosines lowered."""
    drawn_FD = torch.randn(features, hidden_dim, generator=generator(9001, "directions"))
    return torch.linalg.qr(drawn_FD.T)[0].T.contiguous() if features <= hidden_dim else nearly_orthogonal(drawn_FD)


def known(name: str, rows: int) -> Data:
    """Rows of one of `LAWS`."""
    hidden_dim, features = LAWS[name]
    mean_F = ACTIVE / features
    frequency_F = torch.linspace(1.75 * mean_F, 0.25 * mean_F, features, dtype=torch.float64)
    truth = GroundTruth("correlated", directions(hidden_dim, features), frequency_F, noise=0.0)
    train_RD = torch.cat([truth.sample(min(65_536, rows - at), seed=9100 + at)[0] for at in range(0, rows, 65_536)])
    return Data(name, train_RD, truth.sample(32_768, seed=9003)[0], truth)


def site(folder: Path) -> Data:
    """Rows that bench/quality.py keeps."""
    train_RD, held_out_RD = (torch.load(folder / file, weights_only=True) for file in ("rows.pt", "held_out.pt"))
    return Data(folder.name, train_RD, held_out_RD)


def train(data: Data, activation: str, k: int, seed: int, options: argparse.Namespace) -> SAE:
    """The normalised settings, once over the rows."""
    hidden_dim, steps = data.train_RD.shape[1], len(data.train_RD) // BATCH
    size = options.dict_size or (len(data.truth.directions_FD) if data.truth else 2 * hidden_dim)
    start = SAE(hidden_dim, size, k, activation, seed=derive_seed(seed, "bench", "l0"))
    trainer = SAETrainer(
        start,
        options.lr,
        tokens=steps * BATCH,
        warmup_tokens=steps * BATCH // 50,
        precision="fp32",
        seed=seed,
        normalise=True,
        initial_decoder="random" if data.truth else "rows",
        betas=(0.9, 0.95),
        decay_share=0.8,
        aux_k=max(k, hidden_dim // 8),
    )
    trainer.calibrate(data.train_RD[:50_000])
    for batch in data.train_RD[: steps * BATCH].split(BATCH):
        trainer.step(batch)
    return trainer.sae()


@torch.no_grad()
def figures(data: Data, sae: SAE) -> dict[str, float]:
    """Held-out fidelity and proxies, and recovery where features are known."""
    fidelity = Fidelity(sae.hidden_dim, sae.dict_size, ("row",))
    projections = DecoderProjections(sae)
    for x_BD in data.held_out_RD.split(8192):
        codes, none = sae.encode(x_BD), torch.zeros(len(x_BD))
        fidelity.update(x_BD, codes, sae.decode(codes), none, none.bool())
        projections.update(x_BD)
    measured, spread = fidelity.figures(), fidelity.spread
    assert spread is not None
    found = {key: float(measured[key]) for key in ("fvu", "l0", "dead_fraction")}
    found["c_dec"] = decoder_pairwise_cosine(sae) or 0.0
    found |= {f"s N/{part}": projections.nth(sae.dict_size // part) / spread for part in PARTS}
    return found | (recovery(data.truth, sae, rows=8192, seed=9005) if data.truth else {})


def sweep(data: Data, activation: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Means over seeds for each k; every seed's figures beside them."""
    for k in options.k or (KNOWN_K if data.truth else SITE_K):
        runs = []
        for seed in range(options.seeds):
            began = time.process_time()
            runs.append(figures(data, train(data, activation, k, seed, options)))
            took = time.process_time() - began
            print(f"{data.name} {activation} k {k} seed {seed}: {took:.0f} CPU s", file=sys.stderr)
        yield {"k": k, **{key: mean(run[key] for run in runs) for key in runs[0]}, "runs": runs}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line per k; each proxy's lowest is bold."""
    keys = [key for key in rows[0] if key not in ("k", "runs")]
    lowest = {key: min(row[key] for row in rows) for key in keys if key == "c_dec" or key.startswith("s ")}
    lines = ["| k | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for row in rows:
        cells = (f"**{row[key]:.4f}**" if lowest.get(key) == row[key] else f"{row[key]:.4f}" for key in keys)
        lines.append(f"| {row['k']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site-folder", type=Path, help="rows of a model instead of known ones")
    parser.add_argument("--law", action="append", choices=tuple(LAWS), help="of known rows; all by default")
    parser.add_argument("--activation", action="append", help="topk and batch_topk by default")
    parser.add_argument("--k", action="append", type=int)
    parser.add_argument("--dict-size", type=int, help="as many as known features, twice the width of a site")
    parser.add_argument("--rows", type=int, default=800_000, help="known rows to train on")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("l0_proxies.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in (options.site_folder,) if options.site_folder else options.law or tuple(LAWS):
        data = site(name) if options.site_folder else known(name, options.rows)
        for activation in options.activation or ("topk", "batch_topk"):
            found = results[f"{data.name} {activation}"] = list(sweep(data, activation, options))
            write_json(options.out, results)
            print(f"\n{data.name}, {activation}\n\n{table(found)}", flush=True)


if __name__ == "__main__":
    main()
