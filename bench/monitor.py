"""What a monitor costs beside the pass that it rides on, and whether its stated rate holds on fresh conversations.

    PYTHONPATH=src python bench/monitor.py RUN MONITOR --conversations 5000 --scores scores.npy
    PYTHONPATH=src python bench/monitor.py RUN MONITOR --conversations 5000 --scores scores.npy    # the next 5,000

Generated conversations, one thread. CPU time of scoring (codes, sums, turns) against that of the truncated pass alone,
CHUNK conversations at a time in turn; then 20 random halves of all the scores in the file: the threshold from one half,
the rate on the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenscope.analysis.detector import Detector
from qwenscope.analysis.piles import Reader
from qwenscope.analysis.rates import threshold_at
from qwenscope.corpus.tool_use import chat_conversation
from qwenscope.lm.batches import make_batches
from qwenscope.lm.sites import Site
from qwenscope.opening import open_target

CHUNK = 250
SPLITS = 20
RATES = (0.2, 0.1, 0.05)


def cpu_seconds(act: Callable[[], Any]) -> float:
    """CPU time of this process that `act` takes."""
    began = time.process_time()
    act()
    return time.process_time() - began


def main() -> None:
    """Print the ratio and the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("monitor", type=Path)
    parser.add_argument("--conversations", type=int, default=500)
    parser.add_argument("--scores", type=Path, required=True, help="continued where it ends")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target, detector = open_target(options.run), Detector.load(options.monitor)
    lm, sae = target.language_model(truncated=True), detector.sae(target)
    site, corpus = Site(detector.about["site"]), target.recipe.corpus
    reader = Reader(lm.tokenizer, corpus.max_length)
    scores = np.load(options.scores).tolist() if options.scores.exists() else []
    bare_seconds = scored_seconds = 0.0
    tokens = 0
    for start in range(len(scores), len(scores) + options.conversations, CHUNK):
        rows = [chat_conversation(3, number) for number in range(start, start + CHUNK)]
        conversations = [reader.read(row, "row").conversation for row in rows]
        lengths = [len(each.token_ids) for each in conversations]
        token_ids = [each.token_ids for each in conversations]
        batches = make_batches(lengths, token_ids, corpus.batch_tokens, 0, torch.device("cpu"))

        def bare(batches: Any = batches) -> None:
            for batch in batches:
                lm.streams(batch.input_ids_CT, batch.lengths_C, [site])

        def scored(conversations: Any = conversations) -> None:
            scores.extend(found.score for found in detector.score(lm, sae, conversations, target.recipe))

        if not tokens:
            bare()
        order = (bare, scored) if start // CHUNK % 2 else (scored, bare)
        seconds = {act: cpu_seconds(act) for act in order}
        bare_seconds += seconds[bare]
        scored_seconds += seconds[scored]
        tokens += sum(lengths)
        np.save(options.scores, scores)
    print(f"{tokens:,} tokens in {options.conversations:,} conversations, up to {site}")
    print(f"pass alone {bare_seconds:.1f} CPU s, with scores {scored_seconds:.1f}: {bare_seconds / scored_seconds:.3f}")
    show_rates(np.array(scores))


def show_rates(scores: np.ndarray) -> None:
    """Stated and realised rates on random halves."""
    random = np.random.default_rng(0)
    for fpr in RATES:
        found = []
        for _ in range(SPLITS):
            one, other = np.array_split(random.permutation(scores), 2)
            found.append(float((other > threshold_at(one, fpr, "half")).mean()))
        within = sum(rate <= 1.2 * fpr for rate in found)
        print(
            f"{len(scores):,} scores, stated {fpr:.0%}, realised on {SPLITS} fresh halves: mean {np.mean(found):.2%}, "
            f"{min(found):.2%} to {max(found):.2%}; {within} of {SPLITS} within 1.2 x"
        )


if __name__ == "__main__":
    main()
