"""What the closing phase (training.kl_share) does: runs of one recipe with and without it, at equal tokens.

    python bench/kl_phase.py RECIPE OUT [--set KEY=VALUE ...] [--shares 0 0.12] [--eval-tokens N]

Each run is a process of its own. Prints a table of hook points: FVU, KL and the CE gap (spliced less clean, in nats per
token) on held-out conversations, of each share and relative to the first; and of each run its CPU seconds, those of the
closing phase, and the peak of its memory before the phase and in all. Runs that are complete in OUT are not made again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qwenscope.evaluation.run import evaluate
from qwenscope.recipe import load_recipe
from qwenscope.training.run import train
from qwenscope.training.telemetry import Progress

Figures = dict[str, dict[str, float]]


def took_file(run: Path) -> Path:
    return run.with_name(f"{run.name}.json")


def one_run(recipe: str, overrides: list[str], run: Path) -> None:
    """Train into `run`, and write beside it what it took."""
    began: dict[str, float] = {}
    peaks: dict[str, float] = {}

    def look(progress: Progress) -> None:
        began.setdefault(progress.phase, time.process_time())
        peaks[progress.phase] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    train(load_recipe(recipe, overrides), run, on_progress=look)
    ended = time.process_time()
    closing = began["saving"] - began["closing"] if "closing" in began else 0.0
    took = {"cpu_seconds": ended, "closing_seconds": closing, "gb_before": peaks["training"], "gb": peaks["complete"]}
    took_file(run).write_text(json.dumps(took))


def measured(run: Path, tokens: int) -> Figures:
    """{hook point: figures}, over splits by their predicted tokens."""
    result: dict[str, Any] = evaluate(run, tokens=tokens)
    figures: Figures = {}
    for sae_id, splits in result["saes"].items():
        total = sum(cell["predicted_tokens"] for cell in splits.values())
        cells = [(cell, cell["predicted_tokens"] / total) for cell in splits.values()]
        figures[sae_id] = {
            "fvu": sum(share * cell["fvu"] for cell, share in cells),
            "kl": sum(share * cell["kl"] for cell, share in cells),
            "gap": sum(share * (cell["ce_spliced"] - cell["ce_clean"]) for cell, share in cells),
            "dead": sum(share * cell["dead_fraction"] for cell, share in cells),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.12])
    parser.add_argument("--eval-tokens", type=int, default=8000)
    parser.add_argument("--one", action="store_true", help="make one run, into OUT")
    options = parser.parse_args()
    if options.one:
        one_run(options.recipe, options.overrides, options.out)
        return
    print("| share | hook point | FVU | | KL | | CE gap | | dead |\n|---|---|---|---|---|---|---|---|---|")
    first: Figures | None = None
    costs = []
    for share in options.shares:
        run = options.out / f"share-{share:g}"
        if not took_file(run).exists():
            settings = [f"--set={pair}" for pair in (*options.overrides, f"training.kl_share={share}")]
            subprocess.run([sys.executable, __file__, options.recipe, str(run), "--one", *settings], check=True)
        figures = measured(run, options.eval_tokens)
        first = first or figures
        for sae_id, found in figures.items():
            cells = [f"{found[key]:.4f} | {found[key] / first[sae_id][key]:.3f}" for key in ("fvu", "kl", "gap")]
            print(f"| {share:g} | {sae_id} | {' | '.join(cells)} | {found['dead']:.1%} |", flush=True)
        costs.append({"share": share, **json.loads(took_file(run).read_text())})
    for cost in costs:
        print(json.dumps({key: round(value, 3) for key, value in cost.items()}))


if __name__ == "__main__":
    main()
