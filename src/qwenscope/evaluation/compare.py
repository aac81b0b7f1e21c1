"""Two suites of SAEs side by side: the same language model, the same tokens, SAE against SAE at each layer they share.

Fidelity and splice come from the evaluation room in one pass over the data for both suites; differences carry paired
bootstrap intervals over conversations. Latents are matched by their decoder directions.

Legend: N latents of the first SAE, M of the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qwenscope.errors import FormatError
from qwenscope.evaluation.measure import SplitMeasurement, SplitMeter
from qwenscope.evaluation.pairs import BOOTSTRAP, Pair, compare_split, overlap, unit_decoder
from qwenscope.evaluation.run import counts, fired
from qwenscope.lm.sites import Site
from qwenscope.opening import check_widths, open_target
from qwenscope.sae.sae import SAE

NUMBERS = (
    "tokens",
    "mse",
    "fvu",
    "explained_variance",
    "explained_variance_per_dim",
    "cosine",
    "l0",
    "dead_fraction",
    "ce_clean",
    "ce_spliced",
    "ce_zero_ablation",
    "ce_mean_ablation",
    "ce_recovered_zero",
    "ce_recovered_mean",
    "kl",
)
"""What every SAE has of every split in evaluation.json."""
SPECIAL = "mse_special_tokens"  # has no value where a split holds no special token
_BEST = 20  # matched latents listed per pair
_CHUNK = 2048  # decoder rows compared at once


def compare(
    first: str | Path,
    second: str | Path,
    *,
    data: Path | None = None,
    tokens: int | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Measure two suites on the same tokens.

    Args:
        first: what `open_target` takes; its recipe says which language model and which held-out conversations.
        second: likewise. Its SAEs may have been made on another checkpoint; they are measured on the first's.
        data: conversations to measure on instead, as for `evaluate`.
        tokens: tokens per split at most; None takes the recipe's.
        revision: of `second` on the Hub.

    Returns:
        {"language_model", "suites", "data", "bootstrap", "pairs": [{"layer", "first", "second", "splits": {split:
        {"first", "second" (numbers of evaluation.json), "differences"}}, "latents"}]}.

    Raises:
        FormatError: no site is in both suites, an SAE does not say its layer, or sizes do not fit.
        ModelError, CorpusError, HubError: as `evaluate`.
    """
    opened = open_target(first)
    other = open_target(second, revision=revision, like=opened)
    sides = {"first": opened, "second": other}
    sites = {f"{side}:{id}": site for side, target in sides.items() for id, site in target.sites.items()}
    targets = {f"{side}:{id}": site for side, target in sides.items() for id, site in target.targets.items()}
    pairs = _pairs(sites, targets, first, second)
    used = {sae_id for pair in pairs for sae_id in (pair.first, pair.second)}
    lm = opened.language_model()
    saes = {f"{side}:{id}": sae for side, target in sides.items() for id, sae in target.saes.items()}
    saes = {sae_id: sae.to(lm.device).eval() for sae_id, sae in saes.items() if sae_id in used}
    hooked, targets = ({sae_id: where[sae_id] for sae_id in saes} for where in (sites, targets))
    check_widths(saes, hooked, lm, targets)
    splits = opened.splits(lm.tokenizer, tokens or opened.recipe.evaluation.tokens, data)
    measured = {
        name: SplitMeter(lm, saes, hooked, found, opened.recipe, targets=targets).run()
        for name, found in splits.items()
    }
    return {
        "language_model": {"name": lm.name, "revision": lm.revision},
        "suites": {"first": str(first), "second": str(second)},
        "data": counts(splits),
        "bootstrap": BOOTSTRAP,
        "pairs": [_pair_result(pair, saes, hooked, measured, opened.recipe.seed) for pair in pairs],
    }


def _pairs(sites: Mapping[str, Site], targets: Mapping[str, Site], first: str | Path, second: str | Path) -> list[Pair]:
    """Every SAE of the first suite with every one of the second that reads, and reconstructs, at the same site."""
    sides = [[sae_id for sae_id in sites if sae_id.startswith(side)] for side in ("first:", "second:")]
    places = {sae_id: (sites[sae_id], targets[sae_id]) for sae_id in sites}
    pairs = [Pair("same_layer", a, b) for a in sides[0] for b in sides[1] if places[a] == places[b]]
    if not pairs:
        there = [", ".join(map(str, sorted({sites[sae_id] for sae_id in side}))) for side in sides]
        raise FormatError(f"no site is in both suites: {first} has {there[0]}, {second} has {there[1]}")
    return sorted(pairs, key=lambda pair: sites[pair.first])


def _pair_result(
    pair: Pair,
    saes: Mapping[str, SAE],
    sites: Mapping[str, Site],
    measured: Mapping[str, SplitMeasurement],
    seed: int,
) -> dict[str, Any]:
    names = {side: sae_id.partition(":")[2] for side, sae_id in (("first", pair.first), ("second", pair.second))}
    fired_N, fired_M = fired(measured, pair.first) > 0, fired(measured, pair.second) > 0
    a, b = saes[pair.first], saes[pair.second]
    splits = {}
    for split, found in measured.items():
        compared = compare_split([pair], found.sums, seed)
        splits[split] = {
            "first": _numbers(found.figures[pair.first]),
            "second": _numbers(found.figures[pair.second]),
            "differences": compared["differences"][f"{pair.first} -> {pair.second}"],
        }
    return {
        **sites[pair.first].described(),
        **names,
        "sizes": {side: [sae.dict_size, sae.k] for side, sae in (("first", a), ("second", b))},
        "splits": splits,
        "latents": {"overlap": overlap(a, b, fired_N, fired_M, seed), "matched": matched_latents(a, b)},
    }


def _numbers(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: figures[key] for key in (*NUMBERS, SPECIAL)}


@torch.no_grad()
def matched_latents(first: SAE, second: SAE) -> dict[str, Any]:
    """Latents that are each other's nearest by cosine of decoder directions.

    Returns:
        {"mutual": how many, "mean_cosine": of them (None if there are none), "best": [[latent of the first, of the
        second, cosine], ...] of the closest 20}.
    """
    a_ND, b_MD = unit_decoder(first).cpu(), unit_decoder(second).cpu()
    best_M = torch.full((len(b_MD),), -torch.inf, dtype=torch.float32)
    owner_M = torch.zeros(len(b_MD), dtype=torch.int64)
    cosine_N, partner_N = torch.empty(len(a_ND)), torch.empty(len(a_ND), dtype=torch.int64)
    for start in range(0, len(a_ND), _CHUNK):
        cosine_RM = a_ND[start : start + _CHUNK] @ b_MD.T
        cosine_N[start : start + _CHUNK], partner_N[start : start + _CHUNK] = cosine_RM.max(1)
        value_M, row_M = cosine_RM.max(0)
        better_M = value_M > best_M
        best_M[better_M], owner_M[better_M] = value_M[better_M], row_M[better_M] + start
    mutual_N = owner_M[partner_N] == torch.arange(len(a_ND))
    found = mutual_N.nonzero().squeeze(1)
    order = found[cosine_N[found].argsort(descending=True, stable=True)][:_BEST]
    return {
        "mutual": len(found),
        "mean_cosine": float(cosine_N[found].double().mean()) if len(found) else None,
        "best": [[int(i), int(partner_N[i]), float(cosine_N[i])] for i in order],
    }
