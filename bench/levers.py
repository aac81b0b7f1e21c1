"""What else might make an SAE better: ways to train it, each beside the recipe on the same rows, in error and in use.

    python bench/levers.py runs/levers --recipe smollm2-135m --site layers.15 [--set KEY=VALUE] [--lever NAME ...]

Each lever sees every row once, in one order, under three seeds. Printed are held-out FVU, dead latents, latents that
are active on more than a tenth of the rows, AUROC of probes on 1 and 4 latents (evaluation/probing.py: the mean over
families of labels and divisions of the conversations), and `stable`, the share of latents that another seed finds too.

recipe      the recipe's own settings.
random      the decoder stays random; the encoder learns for 200 steps (evaluation/baselines.py).
frozen      the decoder stays where it started for the first half of the rows.
penalty     after each step the encoder's bias of a latent that is active on more than a tenth of recent rows is
            lowered, by the learning rate for each tenth too many.
merged      two seeds on a quarter of the rows each; latents that both found become one, latents of the first fill up,
            and the other half trains that.
nested      prefixes of a sixteenth and a quarter of the latents (Matryoshka: Bussmann et al. 2025).
batch_topk  rows share the batch's active latents (Bussmann et al. 2024).
cautious    steps leave out what their batch contradicts (Liang et al. 2024), at twice the rate.
kl          not here: bench/kl_phase.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from quality import OUR_KEYS, figures, our_rate
from quality_data import Data, model_rows
from torch import Tensor
from truth import cross_seed_stability

from qwenscope.corpus.stream import CorpusStream
from qwenscope.evaluation.baselines import frozen_decoder_sae
from qwenscope.evaluation.probing import Probe, Sample, auroc, by_family, draws, over_families, tasks_of
from qwenscope.evaluation.token_labels import categories, joined
from qwenscope.evaluation.usefulness import CONVERSATIONS, DENSE, draw
from qwenscope.lm.load import load_language_model
from qwenscope.lm.sites import Site
from qwenscope.recipe import load_recipe
from qwenscope.sae.sae import SAE
from qwenscope.seeds import derive_seed
from qwenscope.training.trainer import SAETrainer

FOUND_AGAIN = 0.7
"""Cosine of decoder directions above which two seeds' latents are one."""
AVERAGED = 32
"""Steps over which a latent's share of active rows is averaged."""


@dataclass(frozen=True)
class Budget:
    """How an SAE is trained, whatever the lever."""

    dict_size: int
    k: int
    batch: int
    lr: float
    settings: dict[str, Any]

    def trainer(self, start: SAE, rows: int, seed: int, **changes: Any) -> SAETrainer:
        tokens = rows // self.batch * self.batch
        settings = self.settings | changes
        return SAETrainer(start, self.lr, tokens=tokens, warmup_tokens=tokens // 50, seed=seed, **settings)

    def sae(self, hidden: int, seed: int, activation: str = "topk") -> SAE:
        return SAE(hidden, self.dict_size, self.k, activation, seed=derive_seed(seed, "bench", "ours"))


Train = Callable[[Budget, Tensor, int], SAE]


def trained(budget: Budget, x_RD: Tensor, seed: int, activation: str = "topk", **changes: Any) -> SAE:
    """By the recipe, or with some settings changed."""
    trainer = budget.trainer(budget.sae(x_RD.shape[1], seed, activation), len(x_RD), seed, **changes)
    trainer.calibrate(x_RD[:50_000])
    run(trainer, x_RD, budget.batch)
    return trainer.sae()


def run(
    trainer: SAETrainer,
    x_RD: Tensor,
    batch: int,
    before: Callable[[Tensor], None] = lambda _: None,
    after: Callable[[float], None] = lambda _: None,
) -> None:
    """Step through whole batches of the rows; `before` each one is given its rows, `after` it its learning rate."""
    for x_BD in x_RD[: len(x_RD) // batch * batch].split(batch):
        before(x_BD)
        after(trainer.step(x_BD).lr)


def frozen(budget: Budget, x_RD: Tensor, seed: int) -> SAE:
    trainer = budget.trainer(budget.sae(x_RD.shape[1], seed), len(x_RD), seed)
    half = len(x_RD) // budget.batch // 2
    trainer.calibrate(x_RD[:50_000])
    start_ND = trainer.weights["decoder"].clone()

    def hold(lr: float) -> None:
        if trainer.steps <= half:
            trainer.weights["decoder"].copy_(start_ND)
            trainer.weights.means["decoder"].zero_()
            trainer.weights.squares["decoder"].zero_()

    run(trainer, x_RD, budget.batch, after=hold)
    return trainer.sae()


def penalty(budget: Budget, x_RD: Tensor, seed: int) -> SAE:
    trainer = budget.trainer(budget.sae(x_RD.shape[1], seed), len(x_RD), seed)
    share_N = torch.zeros(budget.dict_size)

    def count(x_BD: Tensor) -> None:
        found = trainer.active.select(trainer._rows(x_BD), None)
        fired_N = torch.bincount(found.indices[found.values > 0], minlength=budget.dict_size) / len(x_BD)
        share_N.add_((fired_N - share_N) / AVERAGED)

    def lower(lr: float) -> None:
        trainer.weights["encoder_bias"].sub_(lr * (share_N / DENSE - 1).clamp_min(0))

    trainer.calibrate(x_RD[:50_000])
    run(trainer, x_RD, budget.batch, count, lower)
    return trainer.sae()


def merged(budget: Budget, x_RD: Tensor, seed: int) -> SAE:
    quarter = len(x_RD) // 4
    first, second = (
        trained(budget, x_RD[part * quarter : (part + 1) * quarter], derive_seed(seed, "merged", str(part)))
        for part in (0, 1)
    )
    decoders = [sae.decoder.weight.detach() for sae in (first, second)]
    cosine_NN = decoders[0].T @ decoders[1]
    best_N = cosine_NN.max(1)
    again_N = best_N.values > FOUND_AGAIN
    start = budget.sae(x_RD.shape[1], seed)
    with torch.no_grad():
        for name in ("encoder.weight", "encoder.bias", "pre_bias", "decoder.weight"):
            start.get_parameter(name).copy_(first.get_parameter(name))
        both_DN = torch.nn.functional.normalize(decoders[0] + decoders[1][:, best_N.indices], dim=0)
        start.decoder.weight.copy_(torch.where(again_N, both_DN, decoders[0]))
        order_N = (~again_N).long().argsort(stable=True)
        print(f"  merged: {int(again_N.sum())} of {budget.dict_size} latents found by both seeds", flush=True)
        start.decoder.weight.copy_(start.decoder.weight[:, order_N])
        start.encoder.weight.copy_(start.encoder.weight[order_N])
        start.encoder.bias.copy_(start.encoder.bias[order_N])
    trainer = budget.trainer(start, len(x_RD) - 2 * quarter, seed, initial_decoder="random")
    trainer.calibrate(x_RD[:50_000])
    run(trainer, x_RD[2 * quarter :], budget.batch)
    return trainer.sae()


LEVERS: dict[str, Train] = {
    "recipe": trained,
    "random": lambda budget, x_RD, seed: frozen_decoder_sae(x_RD, budget.sae(x_RD.shape[1], seed), seed),
    "frozen": frozen,
    "penalty": penalty,
    "merged": merged,
    "nested": lambda budget, x_RD, seed: trained(
        budget, x_RD, seed, prefixes=(budget.dict_size // 16, budget.dict_size // 4)
    ),
    "batch_topk": lambda budget, x_RD, seed: trained(budget, x_RD, seed, "batch_topk"),
    "cautious": lambda budget, x_RD, seed: trained(replace(budget, lr=2 * budget.lr), x_RD, seed, cautious=True),
}


def labelled(recipe_name: str, overrides: Sequence[str], site: Site) -> Sample:
    """Held-out rows of a site with what is known of their tokens."""
    recipe = load_recipe(recipe_name, overrides)
    lm = load_language_model(recipe.lm, last_layer=site.layer)
    stream = CorpusStream(recipe.corpus, lm.tokenizer, seed=recipe.seed, held_out=True)
    chosen = [next(stream) for _ in range(CONVERSATIONS)]
    stream.close()
    known = joined(categories(conversation, lm.tokenizer) for conversation in chosen)
    random = np.random.default_rng(derive_seed(recipe.seed, "usefulness rows") % 2**63)
    return draw(lm, [site], chosen, known, recipe, random)


@torch.no_grad()
def probed(sae: SAE, sample: Sample, site: Site, seeds: Sequence[int]) -> dict[str, float]:
    """AUROC with 1 and 4 latents, and how many latents are dense on the sample."""
    codes_RN = sae.encode(sample.rows[site]).dense().float().numpy()
    once_SC = draws(sample, 0)[:1]
    found = {}
    for latents in (1, 4):
        scores = []
        for seed in seeds:
            tasks = tasks_of(sample, sample.categories, seed)
            by_label = (_measured(codes_RN, sample, task, latents, once_SC) for task in tasks)
            scores.append(over_families(by_family(by_label)))
        found[f"auroc_{latents}"] = float(np.mean(scores))
    return found | {"dense": float(((codes_RN > 0).mean(0) > DENSE).sum())}


def _measured(codes_RN: Any, sample: Sample, task: Any, latents: int, once_SC: Any) -> tuple[str, Any]:
    score_H = Probe.of(codes_RN, task).scores(latents)
    held_R = task.held_R
    return task.family, auroc(score_H, task.positive_R[held_R], sample.conversation_R[held_R], once_SC)


def compare(data: Data, sample: Sample, budget: Budget, names: Sequence[str], seeds: int) -> None:
    """Print a line of each lever."""
    assert data.site is not None
    divisions = [derive_seed(0, f"division {number}") for number in range(3)]
    print("| lever | FVU | dead | dense | AUROC, 1 latent | 4 latents | stable |\n|---|---|---|---|---|---|---|")
    for name in names:
        saes = [LEVERS[name](budget, data.train_RD, seed) for seed in range(seeds)]
        rows = [figures(data, sae) | probed(sae, sample, data.site, divisions) for sae in saes]
        pairs = [(a, b) for i, a in enumerate(saes) for b in saes[i + 1 :]]
        stable = mean(cross_seed_stability(a, b)["stable"] for a, b in pairs) if pairs else float("nan")
        fvu = ", ".join(f"{row['fvu']:.4f}" for row in rows)
        one, four = (", ".join(f"{row[key]:.3f}" for row in rows) for key in ("auroc_1", "auroc_4"))
        dead, dense = (mean(row[key] for row in rows) for key in ("dead_fraction", "dense"))
        print(f"| {name} | {fvu} | {dead:.1%} | {dense:.1f} | {one} | {four} | {stable:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps the rows")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes the recipe")
    parser.add_argument("--site", required=True)
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--held-out", type=int, default=16_384)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lever", action="append", choices=LEVERS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe, site = load_recipe(options.recipe, options.set), Site(options.site)
    (data,) = model_rows(recipe, [site], options.rows, options.held_out, options.folder)
    point = next(point for point in recipe.hook_points.values() if point.site == site.name)
    settings = {key: getattr(recipe.training, key) for key in OUR_KEYS} | {"precision": "fp32"}
    budget = Budget(point.dict_size, point.k, recipe.training.batch_size, our_rate(data), settings)
    compare(data, labelled(options.recipe, options.set, site), budget, options.lever or list(LEVERS), options.seeds)


if __name__ == "__main__":
    main()
