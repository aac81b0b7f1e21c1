"""Which experts routers choose where a latent fires, and where it is added.

Routers go by the token: so firing tokens are compared with the same tokens of the same conversations on which the
latent is silent, and labels are permuted among these. Definitions: docs/analysis.md.

Legend: R tokens that count, M tokens of strata that hold both kinds, S strata, E experts, k experts chosen per token,
X pushes (the latent's, then random directions), B the labels as they are and permutations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qwenscope.evaluation.downstream import RoutingShift, chosen_experts
from qwenscope.seeds import derive_seed

PERMUTATIONS = 500
LISTED = 20
Rates = dict[int, Tensor]
"""{layer: [E]}."""


def choices(logits: Mapping[int, Tensor], routers: Mapping[int, nn.Module], rows_R: Tensor) -> dict[int, Tensor]:
    """{layer: experts chosen, int64 [R, k]} of these rows of router logits [C * T, E], as `RoutingShift` chooses."""
    return {
        layer: logits[layer][rows_R].float().topk(int(router.top_k)).indices  # type: ignore[arg-type]
        for layer, router in routers.items()
    }


@dataclass
class Firing:
    """Choices of all tokens that count, and on which of them the latent fires."""

    experts: Mapping[int, int]
    """{layer: how many there are}."""
    chosen: dict[int, list[Tensor]] = field(default_factory=dict)
    fires: list[Tensor] = field(default_factory=list)
    strata: list[Tensor] = field(default_factory=list)

    def add(self, chosen: Mapping[int, Tensor], fires_R: Tensor, stratum_R: Tensor) -> None:
        """Add one batch: {layer: [R, k]}, bool [R], and a number for each token of each conversation, int64 [R]."""
        for layer, chosen_Rk in chosen.items():
            self.chosen.setdefault(layer, []).append(chosen_Rk.to("cpu", torch.int16))
        self.fires.append(fires_R.cpu())
        self.strata.append(stratum_R.cpu())

    def figures(self, seed: int) -> dict[str, Any] | None:
        """docs/analysis.md says what the keys mean; None where the latent fires nowhere, or everywhere."""
        fires_R, stratum_R = torch.cat(self.fires), torch.cat(self.strata)
        if not bool(fires_R.any()) or bool(fires_R.all()):
            return None
        members_M, weights_BM, firing = matched(fires_R.numpy(), stratum_R.numpy(), seed)
        found: dict[str, Any] = {"tokens": int(fires_R.sum()), "matched_tokens": firing, "layers": sorted(self.chosen)}
        shift, differences, rates = [], dict[int, Tensor](), dict[int, tuple[Tensor, Tensor]]()
        for layer in found["layers"]:
            chosen_Rk = torch.cat(self.chosen[layer]).long()
            k = chosen_Rk.shape[1]
            on_RE = torch.zeros(len(chosen_Rk), self.experts[layer]).scatter_(1, chosen_Rk, 1.0)
            rates[layer] = on_RE[fires_R].mean(0), on_RE[~fires_R].mean(0)
            shift.append(float((rates[layer][0] - rates[layer][1]).abs().sum()) / (2 * k))
            if firing:
                differences[layer] = weights_BM @ on_RE[members_M]
        found["shift"] = shift
        found |= _tested(differences, {layer: self.chosen[layer][0].shape[1] for layer in differences})
        found["experts"] = _most_changed(rates, differences)
        return found


def matched(fires_R: NDArray[np.bool_], stratum_R: NDArray[np.int64], seed: int) -> tuple[Tensor, Tensor, int]:
    """Weights under which a sum over tokens is the firing tokens' mean less that of the others of their strata.

    Returns:
        The tokens of strata that hold both kinds (int64 [M]); their weights as they are, then under labels permuted
        within strata (float32 [B, M]); how many of these tokens fire.
    """
    _, place_R, count_S = np.unique(stratum_R, return_inverse=True, return_counts=True)
    firing_S = np.bincount(place_R, fires_R, len(count_S)).astype(np.int64)
    members_M = np.flatnonzero(((firing_S > 0) & (firing_S < count_S))[place_R])
    place_M = place_R[members_M]
    total = int(fires_R[members_M].sum())
    order_M = np.argsort(place_M, kind="stable")
    sorted_M = place_M[order_M]
    rank_M = np.arange(len(sorted_M)) - np.searchsorted(sorted_M, sorted_M)
    others_M = count_S[sorted_M] - firing_S[sorted_M]
    value_M = np.where(rank_M < firing_S[sorted_M], 1.0, -firing_S[sorted_M] / np.maximum(others_M, 1)) / max(total, 1)
    random = np.random.default_rng(derive_seed(seed, "firing labels"))
    weights_BM = np.empty((1 + PERMUTATIONS, len(members_M)), dtype=np.float32)
    for b in range(len(weights_BM)):
        key_M = random.random(len(members_M)) if b else ~fires_R[members_M]
        weights_BM[b, np.lexsort((key_M, place_M))] = value_M
    return torch.from_numpy(members_M), torch.from_numpy(weights_BM), total


def _tested(differences: Mapping[int, Tensor], k: Mapping[int, int]) -> dict[str, Any]:
    """Of differences [B, E] by layer: the shift as it is and under permuted labels, and p-values."""
    if not differences:
        return {"matched": None, "permuted": None, "p": None}
    shifts = {layer: apart_BE.abs().sum(1) / (2 * k[layer]) for layer, apart_BE in differences.items()}
    return {
        "matched": [float(shift_B[0]) for shift_B in shifts.values()],
        "permuted": [float(shift_B[1:].mean()) for shift_B in shifts.values()],
        "p": [float((shift_B >= shift_B[0]).double().mean()) for shift_B in shifts.values()],
    }


def _most_changed(
    rates: Mapping[int, tuple[Tensor, Tensor]], differences: Mapping[int, Tensor]
) -> list[dict[str, Any]]:
    """The experts whose rate differs most from the matched tokens'; from all other tokens', where none are matched."""
    apart = {layer: differences[layer][0] if differences else on_E - off_E for layer, (on_E, off_E) in rates.items()}
    found: list[dict[str, Any]] = []
    for layer, expert in _largest(apart):
        fires, others = (float(rate_E[expert]) for rate_E in rates[layer])
        cell = {"layer": layer, "expert": expert, "fires": fires, "others": others}
        found.append(cell | {"matched_difference": None, "p_family": None})
        if differences:
            change = float(apart[layer][expert])
            largest_B = torch.stack([apart_BE.abs().amax(1) for apart_BE in differences.values()]).amax(0)
            p = float((largest_B >= abs(change) - 1e-6).double().mean())
            found[-1] |= {"matched_difference": change, "p_family": p}
    return found


@dataclass
class Added:
    """How routers choose without a push, under it, and under each random direction."""

    routers: Mapping[int, nn.Module]
    shifts: list[RoutingShift] = field(default_factory=list)
    """Of the push, then of each random direction."""
    before: Rates = field(default_factory=dict)
    """Counts of tokens that chose each expert."""
    after: list[Rates] = field(default_factory=list)

    def add(self, clean: Mapping[int, Tensor], pushed: Sequence[Mapping[int, Tensor]], rows_R: Tensor) -> None:
        """Add one batch: router logits [C * T, E] by layer, without a push and under each."""
        if not self.after:
            self.shifts, self.after = [RoutingShift() for _ in pushed], [{} for _ in pushed]
        for counts, logits in zip((self.before, *self.after), (clean, *pushed), strict=True):
            for layer, router in self.routers.items():
                chosen_RE = chosen_experts(logits[layer].float()[rows_R], int(router.top_k))  # type: ignore[arg-type]
                counts[layer] = counts.get(layer, 0) + chosen_RE.sum(0).cpu()
        for shift, logits in zip(self.shifts, pushed, strict=True):
            shift.update(self.routers, clean, logits, rows_R)

    def figures(self) -> dict[str, Any]:
        """docs/analysis.md says what the keys mean."""
        tokens = self.shifts[0].tokens
        own, *random = (shift.figures() for shift in self.shifts)
        found: dict[str, Any] = {"tokens": tokens, "layers": own["layers"]}
        for key in ("overlap", "kl"):
            found[key] = {"latent": own[key], "random": np.mean([each[key] for each in random], 0).tolist()}
        change, beyond = dict[int, Tensor](), dict[int, Tensor]()
        spread = {}
        for layer, before_E in self.before.items():
            apart_XE = torch.stack([after[layer] - before_E for after in self.after]).double() / tokens
            change[layer], spread[layer] = apart_XE[0], apart_XE[1:]
            beyond[layer] = (apart_XE[0].abs() - apart_XE[1:].abs().amax(0)).clamp(min=0)
        count = sum(len(beyond_E) for beyond_E in beyond.values())
        found["beyond"] = sum(int((beyond_E > 0).sum()) for beyond_E in beyond.values()) / count
        found["beyond_by_chance"] = 1 / len(self.after)
        found["experts"] = [
            {
                "layer": layer,
                "expert": expert,
                "before": float(self.before[layer][expert]) / tokens,
                "after": float(self.after[0][layer][expert]) / tokens,
                "change": float(change[layer][expert]),
                "random": [float(spread[layer][:, expert].min()), float(spread[layer][:, expert].max())],
            }
            for layer, expert in _largest(beyond)
        ]
        return found


def _largest(values: Rates) -> list[tuple[int, int]]:
    """(layer, expert) of the largest by size that are not 0, LISTED at most."""
    places = [(layer, expert) for layer, value_E in values.items() for expert in range(len(value_E))]
    flat = torch.cat([value_E.double().abs() for value_E in values.values()])
    order = flat.argsort(descending=True, stable=True)[:LISTED].tolist()
    return [places[number] for number in order if flat[number] > 0]
