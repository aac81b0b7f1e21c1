"""From statistics to what is shown of each latent: rankings, examples, shares; one block of latents at a time.

Legend: M latents of a block, N latents, W window positions.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenscope.corpus.conversation import ROLES
from qwenscope.evaluation.run import target_of
from qwenscope.features.corpus_pass import CONTEXT_COLUMNS, CorpusPass
from qwenscope.features.form import RULE
from qwenscope.features.geometry import (
    BINS_PER_SD,
    LOGIT_REACH,
    CoActivation,
    Ranking,
    counterparts,
    neighbours,
    principal_plane,
    token_effects,
)
from qwenscope.features.statistics import AFTER, BEFORE, BINS_PER_OCTAVE, OCTAVES, TOP
from qwenscope.features.token_text import TokenText, alone, readable
from qwenscope.files import read_object
from qwenscope.lm.forward import final_norm, unembedding
from qwenscope.lm.sites import to_stream
from qwenscope.opening import SPLITS
from qwenscope.sae.activation import described

BLOCK = 256
TOKENS_SHOWN, LATENTS_SHOWN, EXPERTS_SHOWN = 12, 10, 8
BANDS = ("75-100", "50-75", "25-50", "0-25")
"""Quarters of a latent's firings by strength, in percent: quantile examples are drawn from each."""
PER_BAND, NEGATIVES = 4, 10
DENSITY_DECADES = (-6, 0)
DENSITY_BINS_PER_DECADE = 4
MAP_STEPS = 1000
"""A latent's place on the map is an integer, at most so far from the middle."""
LIFT, LIFT_FIRINGS = 1.5, 5
"""From which lift and how many firings on a role or a split is part of a label."""
QUALITY = ("explained_variance", "fvu", "l0", "ce_recovered_mean", "ce_recovered_zero", "dead_fraction", "kl")


@dataclass(frozen=True)
class Latent:
    """One latent, ready to be written."""

    number: int
    columns: dict[str, Any]
    """Its row of the SAE's table."""
    detail: dict[str, Any]
    """Its page; examples are (kind, address, window offsets, activations), tokens are ids."""
    search: tuple[str, str, str, str]
    """Label by rule, peak tokens, promoted tokens (both joined by U+001F), context."""
    peaks: list[tuple[str, float]]
    """(token in lower case, spaces stripped; top examples that peak there over TOP)."""


class Texts:
    """The tokens of a finished corpus pass by address, in memory-mapped files."""

    def __init__(self, corpus_pass: CorpusPass, vocabulary: Sequence[TokenText]) -> None:
        self.vocabulary = vocabulary
        path = corpus_pass.work / "tokens.bin"
        starts = [0]
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            for _, text in corpus_pass.texts():
                file.write(text["tokens"].astype("<i4").tobytes())
                starts.extend((starts[-1] + np.cumsum(text["lengths"])).tolist())
        # A plain array on the mapped file: slices of a memmap cost four times as much.
        self.tokens = np.asarray(np.memmap(path, dtype="<i4", mode="r")) if starts[-1] else np.zeros(0, dtype="<i4")
        self._starts = starts

    def window(self, address: int, before: int = BEFORE, after: int = AFTER) -> tuple[int, list[str]]:
        """(address of the first token, texts of the tokens) around `address`, within its conversation."""
        conversation = bisect_right(self._starts, address) - 1
        low = max(self._starts[conversation], address - before)
        high = min(self._starts[conversation + 1], address + after + 1)
        return low, readable(list(map(self.vocabulary.__getitem__, self.tokens[low:high].tolist())))

    def token(self, address: int) -> str:
        """Text of the token at `address`; of the character that it takes part in."""
        piece = self.vocabulary[int(self.tokens[address])]
        if piece and isinstance(piece, str):
            return piece
        low, texts = self.window(address, before=4, after=4)
        return next((text for text in reversed(texts[: address - low + 1]) if text), "")


class Describer:
    """Describes the latents of one SAE."""

    def __init__(self, corpus_pass: CorpusPass, sae_id: str, texts: Texts) -> None:
        self._lm, self._saes, self._sae_id, self._texts = corpus_pass.lm, corpus_pass.target.saes, sae_id, texts
        self._sae, self._site = self._saes[sae_id], corpus_pass.target.targets[sae_id]
        self._statistics = corpus_pass.statistics[sae_id]
        self._norm, self._unembedding = final_norm(self._lm), unembedding(self._lm)
        sample = self._statistics.coactive
        self._coactive = CoActivation(sample.latents_S[sample.filled], self._sae.dict_size)

    @cached_property
    def _quiet(self) -> Tensor:
        """bool [background windows, N]: the latent does not fire in the window."""
        background = self._statistics.background
        latents = background.latents_S[background.filled].flatten(1).long()
        fires_BN = torch.zeros(len(latents), self._sae.dict_size + 1, dtype=torch.bool)  # the last column takes the -1s
        fires_BN.scatter_(1, torch.where(latents < 0, self._sae.dict_size, latents), True)
        return ~fires_BN[:, :-1]

    def blocks(self) -> Iterator[list[Latent]]:
        """All latents, in order."""
        for start in range(0, self._sae.dict_size, BLOCK):
            yield self._block(start, min(start + BLOCK, self._sae.dict_size))

    def _block(self, start: int, stop: int) -> list[Latent]:
        directions_MD = to_stream(self._lm, self._site, self._sae.decoder.weight.detach().T[start:stop])
        vocabulary = len(self._unembedding)
        effects = token_effects(directions_MD, self._norm, self._unembedding, min(TOKENS_SHOWN, vocabulary))
        near = neighbours(self._sae, start, stop, LATENTS_SHOWN)
        coactive, together_M = self._coactive.of(start, stop, LATENTS_SHOWN)
        elsewhere = {
            sae_id: counterparts(self._sae, other, start, stop)
            for sae_id, other in self._saes.items()
            if sae_id != self._sae_id and len(other.decoder.weight) == len(self._sae.decoder.weight)
        }
        described = []
        for m in range(stop - start):
            detail = {
                **self._counts(start + m),
                "promoted": _pairs(effects.promoted, m),
                "suppressed": _pairs(effects.suppressed, m),
                "logit_spread": _short(effects.spread_M[m]),
                "logits": _trimmed(effects.histogram_MH[m], -LOGIT_REACH, "per_sd", BINS_PER_SD),
                "neighbours": _pairs(near, m),
                "elsewhere": [[id, int(found[1][m]), _short(found[0][m])] for id, found in elsewhere.items()],
                "coactive": [
                    [latent, phi, int(shared)]
                    for (latent, phi), shared in zip(_pairs(coactive, m), together_M[m].tolist(), strict=True)
                    if phi > 0
                ],
                "experts": self._experts(start + m),
                "examples": self._examples(start + m),
            }
            described.append(self._latent(start + m, detail))
        return described

    def _counts(self, latent: int) -> dict[str, Any]:
        """Density, activation histogram, shares by split and role."""
        found = self._statistics
        fired = int(found.fired_N[latent])
        context = found.context_NF[latent].tolist()
        return {
            "fired": fired,
            "density": fired / max(found.rows, 1),
            "mean": _short(found.total_N[latent] / max(fired, 1)),
            "max": _short(found.top.values_NM[latent].max()),
            "histogram": _trimmed(found.histogram_NH[latent], OCTAVES[0], "per_octave", BINS_PER_OCTAVE),
            "splits": context[: len(SPLITS)],
            "roles": context[len(SPLITS) : CONTEXT_COLUMNS],
        }

    def _experts(self, latent: int) -> list[list[float]]:
        """[expert, share of the latent's firings it was chosen in, its share over all tokens], by the difference."""
        found = self._statistics
        fired = int(found.fired_N[latent])
        chosen_E = found.context_NF[latent, CONTEXT_COLUMNS:].double() / max(fired, 1)
        base_E = found.base_F[CONTEXT_COLUMNS:].double() / max(found.rows, 1)
        if not fired or not len(chosen_E):
            return []
        best = (chosen_E - base_E).topk(min(EXPERTS_SHOWN, len(base_E))).indices.tolist()
        return [[e, _short(chosen_E[e]), _short(base_E[e])] for e in best]

    def _examples(self, latent: int) -> list[list[Any]]:
        """(kind, address, window offsets, activations): top, quantile bands, negatives; no context twice."""
        found = self._statistics
        shown = found.top.contexts_NM[latent][found.top.addresses_NM[latent] >= 0]
        order = found.top.keys_NM[latent].argsort(descending=True, stable=True)
        order = order[found.top.addresses_NM[latent][order] >= 0]
        examples = _examples(["top"] * len(order), found.top, latent, order)
        values = found.firings.values_NM[latent]
        order = values.argsort(descending=True, stable=True)
        order = order[found.firings.addresses_NM[latent][order] >= 0]
        order = order[~torch.isin(found.firings.contexts_NM[latent][order], shown)]
        if len(order) >= len(BANDS):
            kinds: list[str] = []
            places: list[int] = []
            for band, of_band in zip(BANDS, np.array_split(order.numpy(), len(BANDS)), strict=True):
                chosen = np.linspace(0, len(of_band) - 1, min(PER_BAND, len(of_band))).round().astype(int)
                kinds += [band] * len(chosen)
                places += of_band[chosen].tolist()
            examples += _examples(kinds, found.firings, latent, torch.tensor(places))
        addresses = found.background.addresses_S[found.background.filled]
        quiet = addresses[self._quiet[:, latent]].tolist()
        step = max(1, len(quiet) // NEGATIVES)
        examples += [
            ["negative", quiet[(i * step + latent) % len(quiet)], [], []] for i in range(min(NEGATIVES, len(quiet)))
        ]
        return examples

    def _latent(self, number: int, detail: dict[str, Any]) -> Latent:
        top = [example[1] for example in detail["examples"] if example[0] == "top"]
        at_peak = Counter(self._texts.token(address) for address in top)
        contexts = ["".join(self._texts.window(address, 8, 4)[1]) for address in top[:4]]
        peaks = [token for token, _ in at_peak.most_common(6)]
        promoted = [alone(self._texts.vocabulary[token]) for token, _ in detail["promoted"]]
        lifts = {name: self._lifts(name, detail[name]) for name in ("roles", "splits")}
        columns = {
            "density": detail["density"],
            "max": detail["max"],
            "mean": detail["mean"],
            "role": max(range(len(ROLES)), key=lifts["roles"].__getitem__) if detail["fired"] else None,
            "split": max(range(len(SPLITS)), key=lifts["splits"].__getitem__) if detail["fired"] else None,
            "peaks": peaks[:4],
            "promoted": promoted[:3],
        }
        shares: dict[str, float] = {}
        for token, count in at_peak.items():
            shares[token.strip().lower()] = shares.get(token.strip().lower(), 0.0) + count / TOP
        rule = _rule(peaks, promoted, detail, lifts) if detail["fired"] else ""
        search = rule, _joined(peaks), _joined(promoted), "\n".join(contexts)
        return Latent(number, columns, detail, search, list(shares.items()))

    def _lifts(self, name: str, counts: Sequence[int]) -> list[float]:
        """How much more often than all tokens a latent's firings have each role, or split; 0 where they have not."""
        first = 0 if name == "splits" else len(SPLITS)
        bases = self._statistics.base_F[first : first + len(counts)].tolist()
        share = self._statistics.rows / max(1, sum(counts))
        return [count * share / base if count else 0.0 for count, base in zip(counts, bases, strict=True)]


def _rule(peaks: Sequence[str], promoted: Sequence[str], detail: dict[str, Any], lifts: dict[str, list[float]]) -> str:
    """A label from counts alone: where a latent peaks, in which role and split more than others, what it promotes."""
    parts = [_quoted(peaks[:3])]
    for name, words in (("roles", ROLES), ("splits", SPLITS)):
        best = max(range(len(words)), key=lifts[name].__getitem__)
        if lifts[name][best] >= LIFT and detail[name][best] >= LIFT_FIRINGS:
            parts.append(f"{words[best].replace('_', ' ')} {lifts[name][best]:.1f} times as often")
    return RULE + "; ".join([*parts, f"promotes {_quoted(promoted[:2])}"])


def _quoted(tokens: Sequence[str]) -> str:
    return ", ".join(json.dumps(token.strip() or token, ensure_ascii=False) for token in tokens)


def places_on_map(
    corpus_pass: CorpusPass, sae_id: str, density: Sequence[float]
) -> tuple[dict[str, list[int | None]], list[float]]:
    """Columns x and y of an SAE's map, None for latents that never fired, and the shares of variance along them."""
    alive_A = np.flatnonzero(np.array(density) > 0)
    xy_A2, shares = principal_plane(corpus_pass.target.saes[sae_id], alive_A)
    columns: dict[str, list[int | None]] = {}
    for name, place_A in zip("xy", (xy_A2.T * MAP_STEPS).round().astype(int), strict=True):
        columns[name] = [None] * len(density)
        for latent, place in zip(alive_A.tolist(), place_A.tolist(), strict=True):
            columns[name][latent] = place
    return columns, [_short(share) for share in shares]


def summary_of(corpus_pass: CorpusPass, sae_id: str, columns: dict[str, list[Any]]) -> dict[str, Any]:
    """What overview and SAE page show of one SAE besides its table."""
    sae, statistics = corpus_pass.target.saes[sae_id], corpus_pass.statistics[sae_id]
    site = corpus_pass.target.sites[sae_id]
    density = np.array(columns["density"])
    alive = density[density > 0]
    bins = (DENSITY_DECADES[1] - DENSITY_DECADES[0]) * DENSITY_BINS_PER_DECADE
    places = ((np.log10(alive) - DENSITY_DECADES[0]) * DENSITY_BINS_PER_DECADE).astype(int).clip(0, bins - 1)
    rows = max(statistics.rows, 1)
    return {
        **site.described(),
        **target_of(sae),
        "digest": sae.digest(),
        "kind": corpus_pass.lm.layer_kinds[site.layer],
        "dict_size": sae.dict_size,
        "k": sae.k,
        **described(sae.activation.name),
        "tokens": statistics.rows,
        "dead": int((density == 0).sum()),
        "l0": float(density.sum()),
        "density": {
            "first": DENSITY_DECADES[0],
            "per_decade": DENSITY_BINS_PER_DECADE,
            "counts": np.bincount(places, minlength=bins).tolist(),
        },
        "base_splits": [count / rows for count in statistics.base_F[: len(SPLITS)].tolist()],
        "base_roles": [count / rows for count in statistics.base_F[len(SPLITS) : CONTEXT_COLUMNS].tolist()],
        "experts": len(statistics.base_F) - CONTEXT_COLUMNS,
        "quality": _quality(corpus_pass.target.folder, sae_id),
    }


def _quality(folder: Path, sae_id: str) -> dict[str, dict[str, float]]:
    """The target's own measurements per split, if it was evaluated."""
    path = folder / "evaluation.json"
    splits = read_object(path).get("saes", {}).get(sae_id, {}) if path.is_file() else {}
    return {
        split: {key: figures[key] for key in QUALITY if figures.get(key) is not None}
        for split, figures in splits.items()
    }


def _examples(kinds: Sequence[str], table: Any, latent: int, places_E: Tensor) -> list[list[Any]]:
    """(kind, address, window offsets, activations) of a table's places."""
    windows_EW = table.windows_NMW[latent, places_E].numpy()
    of_example, offsets = windows_EW.nonzero()
    values = list(map(_short, windows_EW[of_example, offsets].tolist()))
    ends = np.searchsorted(of_example, np.arange(len(kinds) + 1)).tolist()
    addresses, offsets = table.addresses_NM[latent, places_E].tolist(), offsets.tolist()
    return [
        [kind, address, offsets[start:end], values[start:end]]
        for kind, address, (start, end) in zip(kinds, addresses, pairwise(ends), strict=True)
    ]


def _trimmed(bins_H: Tensor, start: float, unit: str, per_unit: int) -> dict[str, Any]:
    """A histogram without its empty ends; its bins begin at `start` and are `per_unit` to a unit."""
    held = bins_H.nonzero().squeeze(1)
    first, last = (int(held[0]), int(held[-1])) if len(held) else (0, -1)
    return {"first": start + first / per_unit, unit: per_unit, "counts": bins_H[first : last + 1].tolist()}


def _joined(tokens: Sequence[str]) -> str:
    return "\x1f".join(token.replace("\x1f", " ") for token in tokens)


def _pairs(ranking: Ranking, m: int) -> list[list[Any]]:
    scores, indices = ranking
    return [[index, _short(score)] for index, score in zip(indices[m].tolist(), scores[m].tolist(), strict=True)]


def _short(value: Any) -> float:
    """Four significant digits: what a page shows, and a quarter of the bytes."""
    return float(f"{float(value):.4g}")
