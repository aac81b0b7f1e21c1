"""DeltaNet against attention: paired differences with confidence intervals, and overlap of neighbouring dictionaries.

In a hybrid model an attention layer follows Gated DeltaNet layers. SAEs on the last DeltaNet layer of a block and on
the attention layer right after it are a matched pair; SAEs on two DeltaNet layers in a row are the position control:
what one step of depth does by itself. Intervals are percentile bootstraps over conversations, paired: both SAEs of a
pair see the same draws.

Legend: S bootstrap samples, C conversations, N latents, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenscope.lm.sites import Site
from qwenscope.recipe import HookPoint
from qwenscope.sae.sae import SAE
from qwenscope.seeds import derive_seed, generator

BOOTSTRAP_SAMPLES = 2000
LEVEL = 0.95
OVERLAP_EDGES = tuple(round(-0.2 + 0.05 * step, 2) for step in range(25))
OVERLAP_CHUNK = 2048  # decoder rows compared at once
SHARED = 0.7  # cosine above which a latent has a counterpart
RANDOM_DIRECTIONS = 512  # for the overlap that chance alone gives

BOOTSTRAP = {"samples": BOOTSTRAP_SAMPLES, "level": LEVEL, "unit": "conversation"}
"""How intervals are made, for the readers of a result."""

Array = NDArray[np.float64]
Sums = Mapping[str, Array]

METRICS: dict[str, Callable[[Sums], Array]] = {
    "fvu": lambda s: s["residual"] / s["deviation"],
    "ce_increase": lambda s: (s["ce_spliced"] - s["ce_clean"]) / s["predicted"],
    "ce_recovered_zero": lambda s: (s["ce_zero_ablation"] - s["ce_spliced"]) / (s["ce_zero_ablation"] - s["ce_clean"]),
    "ce_recovered_mean": lambda s: (s["ce_mean_ablation"] - s["ce_spliced"]) / (s["ce_mean_ablation"] - s["ce_clean"]),
    "kl": lambda s: s["kl_spliced"] / s["predicted"],
}
"""Metrics with intervals, as functions of sums over conversations."""


@dataclass(frozen=True)
class Pair:
    """Two hook points one layer apart: `kind` is "matched" (DeltaNet, then attention) or "position_control"."""

    kind: str
    first: str
    second: str


def find_pairs(hook_points: Mapping[str, HookPoint]) -> list[Pair]:
    """Neighbouring hook points, in order of depth: DeltaNet before attention, and DeltaNet before DeltaNet."""
    names = {("deltanet", "attention"): "matched", ("deltanet", "deltanet"): "position_control"}
    pairs = []
    for first, below in hook_points.items():
        for second, above in hook_points.items():
            kind = names.get((below.kind or "", above.kind or ""))
            same_part = Site(below.site).within == Site(above.site).within
            if kind and same_part and above.layer == below.layer + 1:
                pairs.append(Pair(kind, first, second))
    return sorted(pairs, key=lambda pair: hook_points[pair.first].layer)


def resample(conversations: int, seed: int) -> Array:
    """Bootstrap weights [S, C]: how often each conversation is drawn in each sample; float64."""
    random = np.random.default_rng(derive_seed(seed, "bootstrap"))
    return random.multinomial(conversations, np.full(conversations, 1 / conversations), BOOTSTRAP_SAMPLES).astype(float)


def interval(samples: Array) -> list[float] | None:
    """Percentile interval at LEVEL of finite bootstrap samples; None where some sample has no value."""
    if not np.isfinite(samples).all():
        return None
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def bootstrap(sums: Sums, weights_SC: Array | None) -> dict[str, tuple[float, Array | None]]:
    """{metric: (value on all conversations, bootstrap samples)}.

    Args:
        sums: {name: sum per conversation, float64 [C]}.
        weights_SC: of `resample`, or None where there are too few conversations to draw from.
    """
    whole = {name: value_C.sum(keepdims=True) for name, value_C in sums.items()}
    with np.errstate(divide="ignore", invalid="ignore"):  # a sample may hold nothing but constant rows
        drawn = None if weights_SC is None else {name: weights_SC @ value_C for name, value_C in sums.items()}
        return {
            name: (float(metric(whole)[0]), None if drawn is None else metric(drawn))
            for name, metric in METRICS.items()
        }


def compare_split(pairs: list[Pair], sums: Mapping[str, Sums], seed: int) -> dict[str, Any]:
    """Intervals of each SAE and paired differences (second minus first) on one split.

    Args:
        pairs: of `find_pairs`.
        sums: {sae_id: {name: float64 [C]}}, the same conversations for all.
        seed: of the draws.

    Returns:
        {"intervals": {sae_id: {metric: [low, high]}}, "differences": {"first -> second": {metric: {"first", "second",
        "difference", "interval"}}}}; an interval is None with fewer than two conversations.
    """
    conversations = len(next(iter(next(iter(sums.values())).values())))
    weights_SC = resample(conversations, seed) if conversations > 1 else None
    drawn = {sae_id: bootstrap(named, weights_SC) for sae_id, named in sums.items()}
    intervals = {
        sae_id: {name: None if samples is None else interval(samples) for name, (_, samples) in metrics.items()}
        for sae_id, metrics in drawn.items()
    }
    differences: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        cells = differences.setdefault(f"{pair.first} -> {pair.second}", {})
        for name in METRICS:
            (first, first_S), (second, second_S) = drawn[pair.first][name], drawn[pair.second][name]
            cells[name] = {
                "first": first,
                "second": second,
                "difference": second - first,
                "interval": None if first_S is None or second_S is None else interval(second_S - first_S),
            }
    return {"intervals": intervals, "differences": differences}


def unit_decoder(sae: SAE) -> Tensor:
    """The SAE's decoder directions as unit rows, float32 [N, D], where the SAE is."""
    return torch.nn.functional.normalize(sae.decoder.weight.detach().float().T, dim=1)


def overlap(first: SAE, second: SAE, alive_first_N: Tensor, alive_second_N: Tensor, seed: int) -> dict[str, Any]:
    """How much of each dictionary stands in the other: best cosine of every live latent's decoder direction.

    Args:
        first: SAE of the lower layer.
        second: SAE of the layer above.
        alive_first_N: bool [N], latents that fired at all; the others have no direction to speak of.
        alive_second_N: the same for the second.
        seed: of the random directions that show what chance gives.

    Returns:
        Per direction of view, `mean_max_cosine`, `shared` (share above 0.7), `random_mean_max_cosine` (random unit
        directions looked up in the same dictionary) and a histogram; None where one is all dead, or wider.
    """
    first_ND, second_ND = unit_decoder(first).cpu()[alive_first_N], unit_decoder(second).cpu()[alive_second_N]
    if not len(first_ND) or not len(second_ND) or first_ND.shape[1] != second_ND.shape[1]:
        return {"first_in_second": None, "second_in_first": None}
    random_ND = torch.randn(RANDOM_DIRECTIONS, first_ND.shape[1], generator=generator(seed, "overlap"))
    random_ND = torch.nn.functional.normalize(random_ND, dim=1)
    return {
        "first_in_second": _found(first_ND, second_ND, random_ND),
        "second_in_first": _found(second_ND, first_ND, random_ND),
    }


def _found(query_ND: Tensor, key_ND: Tensor, random_ND: Tensor) -> dict[str, Any]:
    best_N = _best(query_ND, key_ND)
    counts, _ = np.histogram(best_N.clamp(OVERLAP_EDGES[0], OVERLAP_EDGES[-1]).numpy(), bins=np.array(OVERLAP_EDGES))
    return {
        "mean_max_cosine": float(best_N.double().mean()),
        "shared": float((best_N > SHARED).double().mean()),
        "random_mean_max_cosine": float(_best(random_ND, key_ND).double().mean()),
        "edges": list(OVERLAP_EDGES),
        "counts": counts.tolist(),
    }


def _best(query_ND: Tensor, key_ND: Tensor) -> Tensor:
    """Highest cosine of each unit row of `query_ND` with any of `key_ND`."""
    return torch.cat([(part_ND @ key_ND.T).max(1).values for part_ND in torch.split(query_ND, OVERLAP_CHUNK)])
