"""Latents by example: those that fire on some texts beyond their base rate, and not on others.

    find(Index("runs/demo-index"), lm, suite, sites, ["book a table", "book a flight"], but_not=["read a book"])

A latent's base rate is the share of the index's tokens on which it fires; where there are texts that it should not fire
on, its share of their tokens, if that is larger. It is found if it fires on more tokens of the examples than that rate
explains: one-sided binomial tests against the base rate and Fisher's exact tests against the other texts, false
discovery rate (Benjamini and Hochberg 1995) over all latents of all SAEs. Neighboring tokens are no independent draws:
the test keeps latents of the base rate out and says no more. Those that fire in most of the texts come first, and of
these the ones with the largest lift: the lower end of the share's 95 % interval (Wilson 1927) over the rate.

Legend: N latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, false_discovery_control, hypergeom

from qwenscope.errors import FormatError
from qwenscope.features.read import read
from qwenscope.features.store import Index
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.sae.sae import SAE

FDR = 0.01
_Z = 1.96
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fired:
    """What one SAE's latents did in some texts, each text's first token left out."""

    tokens: int
    tokens_N: Array
    """On how many of them each latent fires."""
    texts_N: Array
    """In how many texts it does."""


def fired_in(
    lm: LanguageModel, saes: Mapping[str, SAE], sites: Mapping[str, Site], texts: Sequence[Any]
) -> dict[str, Fired]:
    """Count where latents fire, {sae_id: ...}; `texts` are what `read` takes.

    Raises:
        CorpusError: a text without tokens.
    """
    tokens = 0
    counts = {sae_id: np.zeros((2, sae.dict_size)) for sae_id, sae in saes.items()}
    for text in texts:
        reading = read(lm, lm.tokenizer, text, saes, sites=sites)
        tokens += len(reading.token_ids) - 1
        for sae_id, codes in reading.codes.items():
            active = codes.indices[1:][codes.values[1:] > 0].numpy()
            fired_N = np.bincount(active, minlength=saes[sae_id].dict_size)
            counts[sae_id] += np.stack([fired_N, fired_N > 0])
    return {sae_id: Fired(tokens, *both) for sae_id, both in counts.items()}


def find(
    index: Index,
    lm: LanguageModel,
    saes: Mapping[str, SAE],
    sites: Mapping[str, Site],
    texts: Sequence[Any],
    *,
    but_not: Sequence[Any] = (),
    limit: int = 50,
) -> list[dict[str, Any]]:
    """Latents of all SAEs that fire on `texts` beyond their base rate, best first.

    Args:
        index: whose densities are the base rates.
        lm: the language model, up to the last site at least.
        saes: those of the index.
        sites: where they read.
        texts: what `read` takes, each.
        but_not: texts on which the latents should not fire.
        limit: latents at most.

    Returns:
        As `Index.search`, with {"texts": in how many they fire, "share": of the tokens, "rate": what is to be expected,
        "lift"}.

    Raises:
        FormatError: no text; CorpusError: one without tokens.
    """
    if not texts:
        raise FormatError("give at least one text to find latents by")
    rates = {}
    for sae_id in saes:
        rows = index.saes[sae_id]["tokens"]
        rates[sae_id] = (np.array(index.table(sae_id)["density"]) * rows + 1) / (rows + 2)
    on = fired_in(lm, saes, sites, texts)
    off = fired_in(lm, saes, sites, but_not) if but_not else {}
    best = ranked(on, off, rates)[:limit]
    hits = index.hits([(figures["sae"], figures["latent"]) for figures in best], "example")
    return [{**hit, **figures} for hit, figures in zip(hits, best, strict=True)]


def ranked(on: Mapping[str, Fired], off: Mapping[str, Fired], rates: Mapping[str, Array]) -> list[dict[str, Any]]:
    """The latents that fire beyond their rate, best first: {"sae", "latent", "texts", "share", "rate", "lift"}.

    Args:
        on: what they did in the examples.
        off: what they did in the other texts; may be empty.
        rates: the base rate of every latent [N] of each SAE.
    """
    parts = [_scored(on[sae_id], off.get(sae_id), rate_N) for sae_id, rate_N in rates.items()]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    numbers = np.concatenate([np.arange(len(rate_N)) for rate_N in rates.values()])
    ids = [sae_id for sae_id, rate_N in rates.items() for _ in rate_N]
    found = (false_discovery_control(columns.pop("p")) <= FDR) & (columns["lift"] > 1)
    order = np.lexsort((-columns["lift"], -columns["texts"]))
    return [
        {
            "sae": ids[place],
            "latent": int(numbers[place]),
            "texts": int(columns["texts"][place]),
            **{name: float(columns[name][place]) for name in ("share", "rate", "lift")},
        }
        for place in order
        if found[place]
    ]


def _scored(on: Fired, off: Fired | None, rate_N: Array) -> dict[str, Array]:
    """p-values and figures of one SAE's latents [N]."""
    p_N = binom.sf(on.tokens_N - 1, on.tokens, rate_N)
    if off is not None:
        together_N = on.tokens_N + off.tokens_N
        apart_N = hypergeom.sf(on.tokens_N - 1, on.tokens + off.tokens, together_N, on.tokens)
        p_N = np.where(off.tokens_N > 0, np.maximum(p_N, apart_N), p_N)
        rate_N = np.maximum(rate_N, (off.tokens_N + rate_N) / (off.tokens + 1))
    share_N = on.tokens_N / on.tokens
    center_N = share_N + _Z**2 / (2 * on.tokens)
    spread_N = _Z * np.sqrt(share_N * (1 - share_N) / on.tokens + _Z**2 / (4 * on.tokens**2))
    least_N = (center_N - spread_N) / (1 + _Z**2 / on.tokens)
    return {
        "p": np.where(on.tokens_N > 0, p_N, 1.0),
        "texts": on.texts_N,
        "share": share_N,
        "rate": rate_N,
        "lift": least_N / rate_N,
    }
