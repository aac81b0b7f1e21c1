"""Rows on which bench/quality.py compares trainers: synthetic ones with known features, and the stand-in's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
from qwenscope.recipe import load_recipe
from qwenscope.sae.sae import TopKSAE

HELD_OUT = 32_768
CE_TOKENS = 4096
NOISE = 0.02
KINDS: tuple[Kind, ...] = ("sparse", "correlated", "hierarchical")


@dataclass(frozen=True)
class Data:
    """Training rows (each used once), held-out rows, and the known features or the hooked layer."""

    name: str
    train_RD: Tensor
    held_out_RD: Tensor
    truth: GroundTruth | None = None
    layer: int | None = None


def synthetic(rows: int, dim: int, features: int, active: int, kinds: list[Kind]) -> Iterator[Data]:
    """Each kind of known features; directions, training rows and held-out rows have seeds of their own."""
    for kind in kinds:
        truth = ground_truth(dim, features, kind=kind, active=active, noise=NOISE, seed=9001)
        pieces = [truth.sample(min(65_536, rows - done), seed=9100 + done)[0] for done in range(0, rows, 65_536)]
        yield Data(f"synthetic {kind}", torch.cat(pieces), truth.sample(HELD_OUT, seed=9003)[0], truth)


def standin(rows: int, layers: list[int], cache: Path) -> Iterator[Data]:
    """Rows of the stand-in at each layer, shuffled; held-out ones come from held-out conversations."""
    for layer in layers:
        file = cache / f"rows-{layer}.pt"
        if not file.is_file():
            sites = [Site(f"layers.{each}") for each in layers]
            train, held_out = _harvested(rows, sites, held_out=False), _harvested(HELD_OUT, sites, held_out=True)
            for site in sites:
                torch.save((train[site], held_out[site]), cache / f"rows-{site.layer}.pt")
        train_RD, held_out_RD = torch.load(file, weights_only=True)
        yield Data(f"layer {layer}", train_RD, held_out_RD, layer=layer)


def _harvested(count: int, sites: list[Site], *, held_out: bool) -> dict[Site, Tensor]:
    recipe = load_recipe("standin")
    lm = load_language_model(recipe.lm, last_layer=max(site.layer for site in sites))
    stream = CorpusStream(recipe.corpus, lm.tokenizer, seed=recipe.seed, held_out=held_out)
    conversations, tokens = list[Conversation](), 0
    while tokens < count * 1.01:
        conversations.append(next(stream))
        tokens += len(conversations[-1].token_ids)
    stream.close()
    found = harvest(lm, conversations, sites, recipe.activations, recipe.corpus.batch_tokens).rows
    order = torch.randperm(len(found[sites[0]]), generator=torch.Generator().manual_seed(9004))[:count]
    return {site: x_RD[order].float() for site, x_RD in found.items()}


class Splicer:
    """Measures what SAEs spliced into the stand-in cost it, on the same held-out conversations for all."""

    def __init__(self) -> None:
        self.recipe = load_recipe("standin")
        self.lm: LanguageModel = load_language_model(self.recipe.lm, lm_head=True)
        stream = CorpusStream(self.recipe.corpus, self.lm.tokenizer, seed=self.recipe.seed, held_out=True)
        self.conversations = fill_splits(stream, CE_TOKENS, limit=4 * CE_TOKENS)["tool_use"]
        stream.close()

    def __call__(self, saes: Mapping[str, TopKSAE], layer: int) -> dict[str, dict[str, float]]:
        """{name: CE recovered under both baselines, and KL} of each SAE at `layer`."""
        meter = SplitMeter(self.lm, saes, dict.fromkeys(saes, Site(f"layers.{layer}")), self.conversations, self.recipe)
        found: Mapping[str, Mapping[str, Any]] = meter.run().figures
        keys = ("ce_recovered_mean", "ce_recovered_zero", "kl")
        return {name: {key: float(figures[key]) for key in keys} for name, figures in found.items()}
