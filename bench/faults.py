"""A campaign of SIGKILLs: real processes, killed at random instants and resumed, every end compared to the bit.

    python bench/faults.py --kills 500 --seed 1

prints one JSON object: how many kills, where they struck, what was lost, and whether each run ended as the
uninterrupted one did (the first that does not ends the campaign with an error). Ctrl-C ends it early, with the account
so far. The run is that of tests/tiny_run.py: a tiny random Qwen3.5-MoE, two SAEs, 48 steps, a checkpoint every three.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from tiny_kills import campaign
from tiny_run import BATCH, make_language_model, make_reference, tiny_recipe


def main() -> None:
    """Deal the kills, print the account."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=500)
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    runs = []
    with tempfile.TemporaryDirectory(prefix="qwenscope-faults-") as name:
        folder = Path(name)
        model = make_language_model(folder / "lm")
        reference = make_reference(model, folder / "reference")
        with suppress(KeyboardInterrupt):
            for struck in campaign(chosen.kills, chosen.seed, model, folder, reference):
                runs.append(struck)
                print(f"{len(runs)} runs, {sum(map(len, runs))} kills", file=sys.stderr, flush=True)
    kills = [kill for run in runs for kill in run]
    every = tiny_recipe(Path()).checkpoint.every_tokens
    print(
        json.dumps(
            {
                "kills": len(kills),
                "runs": len(runs),
                "runs_identical_to_the_bit": len(runs),
                "most_kills_in_one_run": max(map(len, runs)),
                "phase_when_killed": dict(Counter(kill.phase for kill in kills).most_common()),
                "saves_torn": sum(kill.save_torn for kill in kills),
                "lost_in_checkpoint_intervals": {
                    "median": statistics.median(kill.lost for kill in kills) / every,
                    "max": round(max(kill.lost for kill in kills) / every, 2),
                },
                "steps_between_checkpoints": every // BATCH,
                "seconds": round(time.monotonic() - began),
                "seed": chosen.seed,
                "machine": {"system": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
