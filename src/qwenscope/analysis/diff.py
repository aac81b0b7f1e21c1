"""Two corpora through one model: latents that fire on more of the one's tokens than of the other's. `checkpoints` puts
one corpus through two models, with the same tests.

    from qwenscope.analysis.diff import diff

    diff("runs/demo", a=Path("march.jsonl"), b=Path("april.jsonl"))

The statistics are those of `contrast`, of each latent's firing rate per conversation; latents that are found are put
together where they fire in the same conversations. Definitions: docs/analysis.md.

Legend: C conversations, N latents, F latents that are tested or found.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from qwenscope.analysis.contrast import FDR, FEWEST_ACTIVE, LISTED, OnProgress, chosen_saes
from qwenscope.analysis.heads import head
from qwenscope.analysis.piles import Piles, Reader, labelled
from qwenscope.analysis.pooling import Pool, Scope, scoped_rows
from qwenscope.analysis.statistics import Design, effect_intervals, effects, permutation_test
from qwenscope.corpus.given import Given
from qwenscope.files import write_json
from qwenscope.opening import Target, as_target
from qwenscope.training.lock import sole_writer

TOGETHER = 0.5
"""Correlation of firing rates over conversations above which latents are one group."""
SHOWN = 5
"""Conversations that are named for each latent."""


def diff(
    target: str | Path | Target,
    *,
    a: Path,
    b: Path,
    out: Path | None = None,
    saes: Sequence[str] = (),
    scope: Scope = Scope(),  # noqa: B008 - frozen
    on_progress: OnProgress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Test every latent's firing rate between two corpora.

    Args:
        target: what `open_target` takes, or what it gave.
        a: conversations or documents.
        b: others.
        out: file to write the result to as JSON.
        saes: ids of those looked at; none named: all.
        scope: which tokens count.
        on_progress: called with (phase, done, total).

    Returns:
        docs/analysis.md says what the keys mean.

    Raises:
        FormatError: an SAE that is not there.
        CorpusError: a corpus cannot be read or has too few conversations.
        LockError: another process writes `out`.
    """
    with sole_writer(out):
        opened = as_target(target)
        ids = chosen_saes(opened, saes)
        lm = opened.language_model(truncated=True)
        reader = Reader(lm.tokenizer, opened.recipe.corpus.max_length)
        sides = reader.pile(a), reader.pile(b)
        piles = labelled([*sides[0], *sides[1]], [True] * len(sides[0]) + [False] * len(sides[1]))
        pools = {id: Pool.empty(len(piles.given), opened.saes[id].dict_size) for id in ids}
        sites = sorted({opened.sites[id] for id in ids})
        for part in scoped_rows(lm, piles.conversations, sites, scope, opened.recipe):
            for id, pool in pools.items():
                with torch.no_grad():
                    pool.add_codes(opened.saes[id].encode(part.rows[opened.sites[id]]), part.conversation_R)
            on_progress("reading", part.stop, len(piles.given))
        result = head("diff", opened, ids) | {"a": str(a), "b": str(b)} | compared(piles, pools, opened.recipe.seed)
        if out is not None:
            write_json(out, result)
    return result


def compared(piles: Piles, pools: dict[str, Pool], seed: int) -> dict[str, Any]:
    """What differs, from the pooled latents of each SAE; the positive side is a."""
    names, rates_CF, pooled_CF = _rates(pools, piles.paired)
    design = Design(piles.positive_C, piles.paired)
    tested = permutation_test(rates_CF, design, seed, FDR)
    effect_F = effects(rates_CF, design)
    order_F = effect_F.abs().argsort(descending=True, stable=True)
    found_F = [f for f in order_F.tolist() if tested.q_F[f] <= FDR][:LISTED]
    grouped_CF = rates_CF[:, found_F]
    groups = _groups(grouped_CF[0::2] - grouped_CF[1::2] if piles.paired else grouped_CF)
    intervals = effect_intervals(grouped_CF, design, seed)
    latents = []
    for place, f in enumerate(found_F):
        side = {"a": rates_CF[piles.positive_C, f], "b": rates_CF[~piles.positive_C, f]}
        latents.append(
            {
                "sae": names[f][0],
                "latent": names[f][1],
                "group": groups[place],
                "effect": float(effect_F[f]),
                "interval": intervals[place],
                "p": float(tested.p_F[f]),
                "q": float(tested.q_F[f]),
                "rate": {name: float(rate.mean()) for name, rate in side.items()},
                "active": {name: float((rate > 0).double().mean()) for name, rate in side.items()},
                "conversations": _changed(piles, rates_CF[:, f])
                if piles.paired
                else _strongest(piles, pooled_CF[:, f]),
            }
        )
    return {
        "conversations": {"a": int(piles.positive_C.sum()), "b": int((~piles.positive_C).sum())},
        "tested": len(names),
        "found": int((tested.q_F <= FDR).sum()),
        "fdr": FDR,
        "latents": latents,
    }


def _rates(pools: dict[str, Pool], paired: bool) -> tuple[list[tuple[str, int]], Tensor, Tensor]:
    """Names of the latents that are tested, and of each [C, F] the share of tokens it fires on and its maximum.

    Tested are those that fire, or whose rate differs between the two of a pair, often enough: exchanging the sides
    changes neither.
    """
    names, rates, largest = [], [], []
    for id, pool in pools.items():
        rate_CN = pool.active_CF.float() / pool.tokens_C.clamp(min=1).unsqueeze(1)
        told_XN = rate_CN[0::2] != rate_CN[1::2] if paired else rate_CN > 0
        tested = (told_XN.sum(0) >= FEWEST_ACTIVE).nonzero().squeeze(1)
        names += [(id, latent) for latent in tested.tolist()]
        rates.append(rate_CN[:, tested])
        largest.append(pool.max_CF[:, tested])
    return names, torch.cat(rates, dim=1), torch.cat(largest, dim=1)


def _groups(rates_CF: Tensor) -> list[int]:
    """Group of each found latent, numbered from 0 as they come: average linkage of 1 - correlation of the rates."""
    count = rates_CF.shape[1]
    if count < 2:
        return [0] * count
    correlation_FF = np.nan_to_num(np.corrcoef(rates_CF.double().numpy().T))
    upper = np.triu_indices(count, 1)
    labels = fcluster(linkage(1 - correlation_FF[upper], "average"), 1 - TOGETHER, "distance").tolist()
    number = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    return [number[label] for label in labels]


def _strongest(piles: Piles, largest_C: Tensor) -> list[dict[str, Any]]:
    """The conversations in which a latent is largest."""
    order_C = [c for c in largest_C.argsort(descending=True, stable=True)[:SHOWN].tolist() if largest_C[c] > 0]
    sides = ["a" if piles.positive_C[c] else "b" for c in order_C]
    return [
        {**_named(piles.given[c]), "side": side, "max": float(largest_C[c])}
        for c, side in zip(order_C, sides, strict=True)
    ]


def _changed(piles: Piles, rate_C: Tensor) -> list[dict[str, Any]]:
    """The conversations, each of which stands there for either side, in which a latent's rate changed most."""
    change_P = rate_C[1::2] - rate_C[0::2]
    order_P = change_P.abs().argsort(descending=True, stable=True)[:SHOWN].tolist()
    return [
        {**_named(piles.given[2 * p]), "side": "a" if change_P[p] < 0 else "b", "change": float(change_P[p])}
        for p in order_P
        if change_P[p]
    ]


def _named(given: Given) -> dict[str, Any]:
    """A conversation's id and the beginning of its last message."""
    conversation = given.conversation
    said = conversation.messages[-1]["content"] if conversation.messages else conversation.text
    return {"id": conversation.id, "text": said[:200]}
