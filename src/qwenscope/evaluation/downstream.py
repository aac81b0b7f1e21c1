"""What a splice does above it: expert routing and Gated DeltaNet's recurrent state.

Legend: C conversations of a batch, T positions, D hidden, R rows of real (unpadded) tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from qwenscope.lm.hooks import record, restart
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site


@dataclass
class RoutingShift:
    """Running sums of how one splice shifts the routers above it."""

    tokens: int = 0
    overlap: dict[int, Tensor | float] = field(default_factory=dict)  # numbers on the device, which is not waited for
    divergence: dict[int, Tensor | float] = field(default_factory=dict)

    def update(
        self,
        routers: Mapping[int, nn.Module],
        clean: Mapping[int, Tensor],
        spliced: Mapping[int, Tensor],
        rows_R: Tensor,
    ) -> None:
        """Add one batch.

        Args:
            routers: {layer: router}, for each router's `top_k`.
            clean: {layer: logits [C * T, E]} of the clean pass.
            spliced: the same of the spliced pass, above the splice.
            rows_R: indices of real tokens among the C * T.
        """
        self.tokens += len(rows_R)
        for layer, logits in spliced.items():
            before_RE, after_RE = clean[layer].float()[rows_R], logits.float()[rows_R]
            k = int(routers[layer].top_k)  # type: ignore[arg-type]
            shared_R = (chosen_experts(before_RE, k) & chosen_experts(after_RE, k)).sum(1)
            before_RE, after_RE = before_RE.double().log_softmax(1), after_RE.double().log_softmax(1)
            divergence_R = (before_RE.exp() * (before_RE - after_RE)).sum(1)
            self.overlap[layer] = self.overlap.get(layer, 0.0) + shared_R.double().sum() / k
            self.divergence[layer] = self.divergence.get(layer, 0.0) + divergence_R.sum()

    def figures(self) -> dict[str, list[Any]]:
        """`layers` above the splice, each one's mean top-k `overlap` (1 = same experts) and `kl` (nats)."""
        layers = sorted(self.overlap)
        return {
            "layers": layers,
            "overlap": [float(self.overlap[layer]) / self.tokens for layer in layers],
            "kl": [float(self.divergence[layer]) / self.tokens for layer in layers],
        }


def chosen_experts(logits_RE: Tensor, k: int) -> Tensor:
    """bool [R, E], True at each row's k largest."""
    chosen_RE = torch.zeros_like(logits_RE, dtype=torch.bool)
    return chosen_RE.scatter_(1, logits_RE.topk(k, dim=1).indices, True)


def before_router(site: Site, layer: int) -> bool:
    """Whether a pass reaches `site` before the router of `layer`, which stands in its MLP."""
    return site < Site(f"layers.{layer}.mlp")


@torch.no_grad()
def recurrent_states(lm: LanguageModel, input_ids_CT: Tensor) -> dict[int, Tensor]:
    """Gated DeltaNet's recurrent state after the last position, {layer: [C, heads, d_k, d_v]}; unpadded rows only.

    Layers that a `restart` skips are absent.
    """
    cache = empty_cache(lm)
    lm.decoder(input_ids=input_ids_CT.to(lm.device), use_cache=True, **cache)
    return states_in(cache)


def empty_cache(lm: LanguageModel) -> dict[str, DynamicCache]:
    """A cache under the name by which the decoder takes it."""
    taken = signature(lm.decoder.forward).parameters
    name = "cache" if "cache" in taken else "past_key_values"  # until transformers 5.23
    return {name: DynamicCache(config=lm.model.config.get_text_config(decoder=True))}


def states_in(cache: Mapping[str, DynamicCache]) -> dict[int, Tensor]:
    """The recurrent states that a cache holds, {layer: [C, heads, d_k, d_v]}; passes go on to write into them."""
    (held_all,) = cache.values()
    states = {}
    for layer, held in enumerate(held_all.layers):
        state = getattr(held, "recurrent_states", None)
        if isinstance(state, dict):  # transformers >= 5.20 keeps several per layer
            state = state.get(0)
        if isinstance(state, Tensor):
            states[layer] = state
    return states


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """|after - before| / |before| (Frobenius) of each [C, ...]: float64 [C]."""
    before, after = before.double().flatten(1), after.double().flatten(1)
    change: Tensor = (after - before).norm(dim=1) / before.norm(dim=1)
    return change


@dataclass
class StateShift:
    """Running relative change of the recurrent state above a splice: |S_spliced - S_clean| / |S_clean| (Frobenius)."""

    shifts: dict[int, list[Tensor]] = field(default_factory=dict)

    def update(self, clean: Mapping[int, Tensor], spliced: Mapping[int, Tensor]) -> None:
        """Add one batch: {layer: states} of the clean pass and of the spliced one, which has the layers above it."""
        for layer, state in spliced.items():
            self.shifts.setdefault(layer, []).append(relative_change(clean[layer], state))

    def figures(self) -> dict[str, list[Any]]:
        """DeltaNet `layers` above the splice and the mean `shift` over conversations at each."""
        layers = sorted(self.shifts)
        return {"layers": layers, "shift": [float(torch.cat(self.shifts[layer]).mean()) for layer in layers]}


def add_state_shifts(
    lm: LanguageModel,
    input_ids_CT: Tensor,
    hooked: Iterable[Site],
    targets: Mapping[str, Site],
    splice: Callable[[str, Mapping[Site, Tensor]], Tensor],
    into: Mapping[str, StateShift],
) -> None:
    """Measure the recurrent state at the end of rows, clean and under each splice.

    Args:
        lm: the language model.
        input_ids_CT: int64 token ids without padding, which would go on writing into the state: conversations cut to
            the length of their shortest, which changes nothing before the cut, as no layer looks ahead.
        hooked: sites whose rows `splice` is given.
        targets: {sae_id: site whose rows are replaced}.
        splice: maps (sae_id, {site: x_CTD}) to the spliced rows.
        into: {sae_id: running sums}.
    """
    with record(lm, hooked) as recording:
        clean = recurrent_states(lm, input_ids_CT)
    for sae_id, site in targets.items():
        with restart(lm, recording, site, splice(sae_id, recording.rows)):
            spliced = recurrent_states(lm, input_ids_CT)
        # The mixer of its own layer, which holds that layer's state, is not behind any site.
        into[sae_id].update(clean, {above: state for above, state in spliced.items() if above > site.layer})
