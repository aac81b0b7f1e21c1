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
from qwenscope.evaluation.pairs import BOOTSTRAP_SAMPLES, LEVEL, Pair, compare_split, overlap
from qwenscope.evaluation.run import held_out_conversations, open_target
from qwenscope.evaluation.truth import unit_decoder
from qwenscope.lm.load import load_language_model
from qwenscope.recipe import Recipe
from qwenscope.release.facts import NUMBERS, SPECIAL
from qwenscope.sae.loading import load_suite
from qwenscope.sae.topk import TopKSAE

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
        first: a run or release folder; its recipe says which language model and which held-out conversations.
        second: a run, release, imported suite, or Hub repository in the published layout; each SAE's config.json
            must hold `layer`. Its SAEs may have been made on another checkpoint; they are measured on the first's.
        data: conversations to measure on instead, as for `evaluate`.
        tokens: tokens per split at most; None takes the recipe's.
        revision: of `second` on the Hub.

    Returns:
        {"language_model", "suites", "data", "bootstrap", "pairs": [{"layer", "first", "second", "splits": {split:
        {"first", "second" (numbers of evaluation.json), "differences"}}, "latents"}]}.

    Raises:
        FormatError: no layer is in both suites, an SAE does not say its layer, or sizes do not fit.
        ModelError, CorpusError: as `evaluate`.
    """
    opened = open_target(Path(first))
    recipe = opened.recipe
    layers = {f"first:{sae_id}": point.layer for sae_id, point in recipe.hook_points.items()}
    saes = {f"first:{sae_id}": sae for sae_id, sae in opened.saes.items()}
    for sae_id, sae in load_suite(second, revision=revision).items():
        saes[f"second:{sae_id}"], layers[f"second:{sae_id}"] = sae, _layer(sae, sae_id, second)
    pairs = _pairs(layers, first, second)
    used = {sae_id for pair in pairs for sae_id in (pair.first, pair.second)}
    saes = {sae_id: sae for sae_id, sae in saes.items() if sae_id in used}
    lm = load_language_model(
        recipe.lm.model_copy(update={"revision": opened.revisions.get("model") or recipe.lm.revision}), lm_head=True
    )
    for sae_id, sae in saes.items():
        if sae.hidden_dim != lm.hidden_dim:
            raise FormatError(
                f"{sae_id.partition(':')[2]} has hidden_dim {sae.hidden_dim}; {lm.name} has {lm.hidden_dim}"
            )
        sae.to(lm.device).eval()
    splits = held_out_conversations(opened, lm, data, tokens or recipe.evaluation.tokens)
    hooked = {sae_id: layers[sae_id] for sae_id in saes}
    measured = {name: SplitMeter(lm, saes, hooked, found, recipe).run() for name, found in splits.items()}
    return {
        "language_model": {"name": lm.name, "revision": lm.revision},
        "suites": {"first": str(first), "second": str(second)},
        "data": {
            name: {"conversations": len(found), "tokens": sum(len(each.token_ids) for each in found)}
            for name, found in splits.items()
        },
        "bootstrap": {"samples": BOOTSTRAP_SAMPLES, "level": LEVEL, "unit": "conversation"},
        "pairs": [_pair_result(pair, saes, hooked, measured, recipe) for pair in pairs],
    }


def _layer(sae: TopKSAE, sae_id: str, suite: str | Path) -> int:
    layer = sae.config.get("layer")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise FormatError(f"{suite}: {sae_id}/config.json does not say its layer; add the key layer")
    return layer


def _pairs(layers: Mapping[str, int], first: str | Path, second: str | Path) -> list[Pair]:
    """Every SAE of the first suite with every one of the second at the same layer."""
    sides = [[sae_id for sae_id in layers if sae_id.startswith(side)] for side in ("first:", "second:")]
    pairs = [Pair("same_layer", a, b) for a in sides[0] for b in sides[1] if layers[a] == layers[b]]
    if not pairs:
        there = [", ".join(map(str, sorted({layers[sae_id] for sae_id in side}))) for side in sides]
        raise FormatError(f"no layer is in both suites: {first} has {there[0]}, {second} has {there[1]}")
    return sorted(pairs, key=lambda pair: layers[pair.first])


def _pair_result(
    pair: Pair,
    saes: Mapping[str, TopKSAE],
    layers: Mapping[str, int],
    measured: Mapping[str, SplitMeasurement],
    recipe: Recipe,
) -> dict[str, Any]:
    names = {side: sae_id.partition(":")[2] for side, sae_id in (("first", pair.first), ("second", pair.second))}
    fired_N, fired_M = (
        sum((found.fired_N[sae_id] for found in measured.values()), start=torch.zeros((), dtype=torch.int64)) > 0
        for sae_id in (pair.first, pair.second)
    )
    a, b = saes[pair.first], saes[pair.second]
    splits = {}
    for split, found in measured.items():
        compared = compare_split([pair], found.sums, recipe.seed)
        splits[split] = {
            "first": _numbers(found.figures[pair.first]),
            "second": _numbers(found.figures[pair.second]),
            "differences": compared["differences"][f"{pair.first} -> {pair.second}"],
        }
    return {
        "layer": layers[pair.first],
        **names,
        "sizes": {side: [sae.dict_size, sae.k] for side, sae in (("first", a), ("second", b))},
        "splits": splits,
        "latents": {"overlap": overlap(a, b, fired_N, fired_M, recipe.seed), "matched": matched_latents(a, b)},
    }


def _numbers(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: figures[key] for key in (*NUMBERS, SPECIAL)}


@torch.no_grad()
def matched_latents(first: TopKSAE, second: TopKSAE) -> dict[str, Any]:
    """Latents that are each other's nearest by cosine of decoder directions.

    Returns:
        {"mutual": how many, "mean_cosine": of them (None if there are none), "best": [[latent of the first, of the
        second, cosine], ...] of the closest 20}.
    """
    a_ND, b_MD = unit_decoder(first), unit_decoder(second)
    best_M = torch.full((len(b_MD),), -torch.inf)
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
