"""How far a push changes the recurrent states of the DeltaNet layers above it, token by token.

A conversation is read as a batch with a cache, token by token near the beginning of its answer: the first row is
unsteered, the others are pushed, each at its own positions. Definitions: docs/analysis.md.

Legend: B rows of the batch, T positions, D hidden, L layers, X pushes (the latent's, then random directions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwenscope.evaluation.downstream import empty_cache, relative_change, states_in
from qwenscope.features.steering import Steering
from qwenscope.lm.hooks import intervene
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site

BEFORE, AFTER = 8, 32
"""Tokens before and from the beginning of the answer after which states are looked at."""
Reading = tuple[Sequence[int], int]
"""Tokens, and the position at which the answer begins."""


def followed(lm: LanguageModel, site: Site) -> list[int]:
    """The DeltaNet layers above that of `site`, whose own mixer, which holds its state, is not behind it."""
    return [layer for layer in range(site.layer + 1, len(lm.layers)) if lm.layer_kinds[layer] == "deltanet"]


def state_changes(
    lm: LanguageModel, readings: Sequence[Reading], pushes: Sequence[Steering], places: Sequence[str]
) -> dict[str, Any] | None:
    """Relative change of each state after each token near the beginning of the answer, mean over conversations.

    Args:
        lm: the whole model.
        readings: the conversations.
        pushes: the latent's, then the random directions', all at one site.
        places: which positions are pushed: all, prefill, decode.

    Returns:
        docs/analysis.md says what the keys mean; None where no DeltaNet layer stands above the site.
    """
    site = Site.of(pushes[0].site)  # type: ignore[arg-type] # it is one by now
    layers = followed(lm, site)
    if not layers:
        return None
    before = min(BEFORE, *(start for _, start in readings))
    after = min(AFTER, *(len(ids) - start for ids, start in readings))
    changes = [
        _changes(lm, ids[: start + after], (start - before, start), pushes, places, layers) for ids, start in readings
    ]
    change_BTL = torch.stack(changes).mean(0)
    shown: dict[str, Any] = {"conversations": len(readings), "layers": layers, "first": -before}
    for number, place in enumerate(places):
        change_XTL = change_BTL[number * len(pushes) : (number + 1) * len(pushes)]
        shown[place] = {"latent": change_XTL[0].T.tolist(), "random": change_XTL[1:].mean(0).T.tolist()}
    return shown


@torch.no_grad()
def _changes(
    lm: LanguageModel,
    ids: Sequence[int],
    starts: tuple[int, int],
    pushes: Sequence[Steering],
    places: Sequence[str],
    layers: Sequence[int],
) -> Tensor:
    """float64 [places * X, T, L] after each token from starts[0] on; the answer begins at starts[1]."""
    first, answer = starts
    spans = {"all": (0, len(ids)), "prefill": (0, answer), "decode": (answer, len(ids))}
    cache, found = empty_cache(lm), []
    read = 0

    def edit(x_BTD: Tensor) -> Tensor:
        edited_BTD = x_BTD.float().clone()
        position_T = torch.arange(read, read + x_BTD.shape[1], device=x_BTD.device)
        for number, place in enumerate(places):
            begin, end = spans[place]
            pushed_T1 = ((position_T >= begin) & (position_T < end)).unsqueeze(1)
            for row, push in enumerate(pushes, start=1 + number * len(pushes)):
                edited_BTD[row] += (push.push(x_BTD[row : row + 1]) * pushed_T1)[0]
        return edited_BTD

    with intervene(lm, {Site.of(pushes[0].site): edit}):  # type: ignore[arg-type]
        for end in (*([first] if first else []), *range(first + 1, len(ids) + 1)):
            part_BT = torch.tensor([list(ids[read:end])] * (1 + len(places) * len(pushes)), device=lm.device)
            lm.decoder(input_ids=part_BT, use_cache=True, **cache)
            read = end
            if end > first:
                states = states_in(cache)
                change = [relative_change(states[layer][:1], states[layer][1:]) for layer in layers]
                found.append(torch.stack(change, dim=1).cpu())
    return torch.stack(found, dim=1)
