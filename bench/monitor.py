"""What a monitor costs beside the pass that it rides on, and whether its stated rate holds on fresh conversations.

    PYTHONPATH=bench:src python bench/monitor.py --conversations 400

Stand-in, generated conversations, a random SAE of the recipe's size at layer 23, 16 latents. CPU time of scoring all
conversations (codes, sums, turns) against that of the truncated pass alone, in turn, the median ratio of --rounds; then
20 random halves of the conversations' scores: the threshold from one, the rate on the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qwenscope.analysis.detector import Detector
from qwenscope.analysis.piles import Reader
from qwenscope.analysis.pooling import Scope
from qwenscope.analysis.rates import threshold_at
from qwenscope.corpus.tool_use import chat_conversation
from qwenscope.lm.batches import make_batches
from qwenscope.lm.load import load_language_model
from qwenscope.lm.sites import Site
from qwenscope.recipe import load_recipe
from qwenscope.sae.sae import TopKSAE


def cpu_seconds(act: Callable[[], Any]) -> float:
    """CPU time of this process that `act` takes."""
    began = time.process_time()
    act()
    return time.process_time() - began


def main() -> None:
    """Print the ratio and the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fpr", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe("standin")
    point = recipe.hook_points["sae_attn_mid"]
    site = Site(point.site)
    lm = load_language_model(recipe.lm, last_layer=site.layer)
    reader = Reader(lm.tokenizer, recipe.corpus.max_length)
    rows = [chat_conversation(3, number) for number in range(options.conversations)]
    conversations = [reader.read(row, "row").conversation for row in rows]
    sae = TopKSAE(lm.hidden_dim, point.dict_size, point.k, seed=0)
    random = np.random.default_rng(0)
    latents = np.sort(random.choice(point.dict_size, 16, replace=False))
    detector = Detector(latents, random.normal(size=16), 0.0, "max", Scope(), 0.0, 0.1, {"site": site.name}, {})
    lengths = [len(each.token_ids) for each in conversations]
    batches = make_batches(lengths, [each.token_ids for each in conversations], recipe.corpus.batch_tokens, 0)

    def bare() -> None:
        for batch in batches:
            lm.streams(batch.input_ids_CT, batch.lengths_C, [site])

    scores: list[float] = []

    def scored() -> None:
        scores[:] = [found.score for found in detector.score(lm, sae, conversations, recipe)]

    bare()
    pairs = [(cpu_seconds(bare), cpu_seconds(scored)) for _ in range(options.rounds)]
    ratio = statistics.median(alone / both for alone, both in pairs)
    print(f"{sum(lengths):,} tokens in {len(lengths):,} conversations, up to {site}")
    print(f"throughput with scores / of the bare pass: {ratio:.3f}  {[(round(a, 2), round(b, 2)) for a, b in pairs]}")
    values = np.array(scores)
    rates = []
    for _ in range(20):
        order = random.permutation(len(values))
        half = len(values) // 2
        threshold = threshold_at(values[order[:half]], options.fpr, "half")
        rates.append(float((values[order[half:]] > threshold).mean()))
    print(
        f"stated {options.fpr:.1%}, realised on 20 fresh halves: mean {np.mean(rates):.2%}, "
        f"{min(rates):.2%} to {max(rates):.2%}"
    )


if __name__ == "__main__":
    main()
