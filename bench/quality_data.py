"""Rows on which bench/quality.py compares trainers: synthetic ones with known features, and rows of a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from synth_sae_bench import synth_sae_bench
from torch import Tensor
from truth import GroundTruth, Kind, ground_truth

from qwenscope.activations.harvest import harvest
from qwenscope.corpus.conversation import Conversation
from qwenscope.corpus.stream import CorpusStream
from qwenscope.evaluation.measure import SplitMeter
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.opening import fill_splits
from qwenscope.recipe import Recipe
from qwenscope.sae.sae import TopKSAE

CE_TOKENS = 4096
NOISE = 0.02
KINDS: tuple[Kind, ...] = ("sparse", "correlated", "hierarchical")
SYNTH_SAE_BENCH: Kind = "synth_sae_bench"
MASSIVE = "massive"
OFFSET, HUGE, HUGE_MEAN, HUGE_SPREAD = 3, 4, 100, 10
"""Of massive rows, in standard deviations of an ordinary dimension: what every row has in each, and how many dimensions
have how large a mean and spread."""


@dataclass(frozen=True)
class Data:
    """Training rows (each used once), held-out rows, and the known features or the model's recipe and site."""

    name: str
    train_RD: Tensor
    held_out_RD: Tensor
    truth: GroundTruth | None = None
    site: Site | None = None
    recipe: Recipe | None = None


def synthetic(
    rows: int, dim: int, features: int, active: int, kinds: Sequence[str], held_out: int = 32_768
) -> Iterator[Data]:
    """Each kind of known features; directions, training rows and held-out rows have seeds of their own.

    SynthSAEBench's law has frequencies and noise of its own. Massive rows are sparse ones with an offset and a few
    dimensions as large as some of language models; recovery is not measured on them.
    """
    for kind in kinds:
        if kind == MASSIVE:
            yield massive(rows, dim, features, active, held_out)
            continue
        if kind == SYNTH_SAE_BENCH:
            truth: GroundTruth = synth_sae_bench(dim, features, seed=9001)
        else:
            truth = ground_truth(dim, features, kind=cast(Kind, kind), active=active, noise=NOISE, seed=9001)
        piece = 4096 if kind == SYNTH_SAE_BENCH else 65_536  # rows drawn at once: its features are many
        pieces = [truth.sample(min(piece, rows - done), seed=9100 + done)[0] for done in range(0, rows, piece)]
        yield Data(f"synthetic {kind}", torch.cat(pieces), truth.sample(held_out, seed=9003)[0], truth)


def massive(rows: int, dim: int, features: int, active: int, held_out: int) -> Data:
    """Sparse rows, a common offset, and a few dimensions that are far larger and vary more."""
    truth = ground_truth(dim, features, kind="sparse", active=active, noise=NOISE, seed=9001)
    unit = float(truth.sample(4096, seed=9006)[0].std(0).mean())
    offset_D = unit * OFFSET * torch.randn(dim, generator=torch.Generator().manual_seed(9007))
    offset_D[:HUGE] = unit * HUGE_MEAN

    def drawn(count: int, seed: int) -> Tensor:
        x_BD = truth.sample(count, seed)[0]
        x_BD[:, :HUGE] += unit * HUGE_SPREAD * torch.randn(count, HUGE, generator=torch.Generator().manual_seed(seed))
        return x_BD + offset_D

    pieces = [drawn(min(4096, rows - done), 9100 + done) for done in range(0, rows, 4096)]
    return Data("synthetic massive", torch.cat(pieces), drawn(held_out, 9003))


def model_rows(recipe: Recipe, sites: list[Site], rows: int, held_out: int, folder: Path) -> Iterator[Data]:
    """Rows of the recipe's model and corpus at each site, left out and shuffled as in training.

    They are harvested once and kept in `folder`. Held-out rows come from held-out conversations.
    """
    places = {site: folder / site.name for site in sites}
    if missing := [site for site, place in places.items() if not (place / "rows.pt").is_file()]:
        lm = load_language_model(recipe.lm, last_layer=max(site.layer for site in missing))
        for file, count in (("held_out.pt", held_out), ("rows.pt", rows)):  # rows.pt says that both are there
            for site, x_RD in _harvested(lm, recipe, missing, count, held_out=file == "held_out.pt").items():
                places[site].mkdir(parents=True, exist_ok=True)
                torch.save(x_RD, part := places[site] / f"{file}.part")
                part.rename(places[site] / file)
    for site, place in places.items():
        train_RD, held_out_RD = (torch.load(place / file, weights_only=True) for file in ("rows.pt", "held_out.pt"))
        yield Data(site.name, train_RD, held_out_RD, site=site, recipe=recipe)


def _harvested(
    lm: LanguageModel, recipe: Recipe, sites: list[Site], count: int, *, held_out: bool
) -> dict[Site, Tensor]:
    """`count` rows of each site, the same tokens of all, in one random order; windows are cut as in training."""
    stream = CorpusStream(recipe.corpus, lm.tokenizer, seed=recipe.seed, held_out=held_out)
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    have = 0
    while have < count:
        window, tokens = list[Conversation](), 0
        while tokens < min(recipe.activations.window_tokens, count - have):
            window.append(next(stream))
            tokens += len(window[-1].token_ids)
        rows = harvest(lm, window, sites, recipe.activations, recipe.corpus.batch_tokens).rows
        for site, x_RD in rows.items():
            found[site].append(x_RD.float())
        have += len(rows[sites[0]])
        print(f"{have:,} of {count:,} {'held-out' if held_out else 'training'} rows", file=sys.stderr, flush=True)
    stream.close()
    order = torch.randperm(have, generator=torch.Generator().manual_seed(9004))[:count]
    return {site: torch.cat(parts)[order] for site, parts in found.items()}


class Splicer:
    """Measures what SAEs spliced into the recipe's model cost it, on the same held-out conversations for all."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.lm: LanguageModel = load_language_model(recipe.lm, lm_head=True)
        stream = CorpusStream(recipe.corpus, self.lm.tokenizer, seed=recipe.seed, held_out=True)
        splits = fill_splits(stream, CE_TOKENS, stream.splits, limit=4 * CE_TOKENS)
        self.conversations = [conversation for split in splits.values() for conversation in split]
        stream.close()

    def __call__(self, saes: Mapping[str, TopKSAE], site: Site) -> dict[str, dict[str, float]]:
        """{name: CE recovered under both baselines, and KL} of each SAE at `site`."""
        meter = SplitMeter(self.lm, saes, dict.fromkeys(saes, site), self.conversations, self.recipe)
        found: Mapping[str, Mapping[str, Any]] = meter.run().figures
        keys = ("ce_recovered_mean", "ce_recovered_zero", "kl")
        return {name: {key: float(figures[key]) for key in keys} for name, figures in found.items()}
