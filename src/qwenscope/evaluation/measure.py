"""Measure all SAEs on one split: a first pass for means and kept rows, a second for everything else.

Rows that training leaves out (outliers, non-finite rows, first positions where the recipe says so) are left out here by
the same rule and counted; a splice or an ablation leaves the stream at those positions as it is.

Legend: C conversations, T positions, R kept rows of a batch, P rows with a successor to predict, D hidden, N latents.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenscope.activations.harvest import LEFT_OUT, harvest
from qwenscope.corpus.conversation import ROLES, Conversation
from qwenscope.errors import CorpusError, ModelError
from qwenscope.evaluation.downstream import RoutingShift, StateShift, add_state_shifts, before_router
from qwenscope.evaluation.fidelity import Fidelity, Moments
from qwenscope.evaluation.kept import Kept
from qwenscope.evaluation.l0_proxies import DecoderProjections
from qwenscope.evaluation.work import Work
from qwenscope.lm.batches import Batch, make_batches
from qwenscope.lm.hooks import find_routers, watch_routers
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.lm.splice import CleanPass, clean_pass, losses, replaced, variant_pass
from qwenscope.recipe import Recipe
from qwenscope.sae.sae import SAE

ENCODE_ROWS = 8192  # rows encoded at once: 0.5 GB of pre-activations at 16,384 latents
STATE_BATCHES, STATE_ROWS = 4, 8  # the recurrent state is followed on this many conversations of this many batches

SPLICE_SUMS = tuple(f"{a}_{b}" for a in ("ce", "kl") for b in ("spliced", "zero_ablation", "mean_ablation"))
"""Sums of a splice and its ablations: NaN at a difference of two models, where there is nothing to replace."""

Sums = dict[str, np.ndarray]


@dataclass(frozen=True)
class SplitMeasurement:
    """What one split says about every SAE (C conversations)."""

    figures: dict[str, dict[str, Any]]
    """{sae_id: the contract's entry of evaluation.json}."""
    sums: dict[str, Sums]
    """{sae_id: {name: float64 [C]}}: sums per conversation, for the bootstrap over conversations."""
    fired_N: dict[str, Tensor]
    """{sae_id: int64 [N]}: tokens on which each latent fired."""
    routing: dict[str, dict[str, list[Any]]]
    """{sae_id: shift of the routers above it}; empty for dense models."""
    states: dict[str, dict[str, list[Any]]]
    """{sae_id: shift of the recurrent states above it}; empty where there are none."""


class SplitMeter:
    """Measures SAEs on the conversations of one split.

    Args:
        lm: the whole language model, with its LM head.
        saes: {sae_id: SAE} on the model's device.
        sites: {sae_id: hooked site}.
        conversations: the split; at least two different tokens.
        recipe: which rows are left out, and how batches are cut.
        kept: knows the rows and the ablations that an earlier evaluation measured; None measures all.
        targets: {sae_id: site of the rows that it reconstructs}; None: of those that it reads.
    """

    def __init__(
        self,
        lm: LanguageModel,
        saes: Mapping[str, SAE],
        sites: Mapping[str, Site],
        conversations: Sequence[Conversation],
        recipe: Recipe,
        kept: Kept | None = None,
        targets: Mapping[str, Site] | None = None,
    ):
        self.lm, self.saes, self.sites, self.targets = lm, saes, sites, targets or sites
        self.conversations, self.recipe = conversations, recipe
        self.hooked = sorted({*sites.values(), *self.targets.values()})
        self.recorded = [site for site in self.hooked if not site.is_difference]
        self.spliced = {sae_id: site for sae_id, site in self.targets.items() if not site.is_difference}
        self.routers = {
            layer: router for layer, router in find_routers(lm).items() if before_router(self.hooked[0], layer)
        }
        added = lm.tokenizer.get_added_vocab().values()
        self.special_ids = torch.tensor(sorted(added), dtype=torch.int64, device=lm.device)
        self.fidelity = {
            sae_id: Fidelity(sae.target_dim, sae.dict_size, ROLES, lm.device) for sae_id, sae in saes.items()
        }
        self.projections = {
            sae_id: DecoderProjections(sae) for sae_id, sae in saes.items() if "target" not in sae.config
        }
        self.routing = {sae_id: RoutingShift() for sae_id in saes}
        self.states = {sae_id: StateShift() for sae_id in saes}
        self.sums: dict[str, dict[str, Tensor]] = {sae_id: {} for sae_id in saes}
        self.work = Work.of(lm)
        self.cache = kept
        self.first = None if kept is None else kept.get(conversations, self._rows_key())
        self._look_up_ablations(self.first)

    @property
    def tokens(self) -> int:
        """Of all conversations."""
        return sum(len(conversation.token_ids) for conversation in self.conversations)

    @property
    def units(self) -> int:
        """What `run` will report, in all."""
        first = self.work.up_to(self.hooked[-1]) if self.first is None else 0
        passes = self.work.from_((*self.ablated, *self.ablated, *self.spliced.values()))
        return self.tokens * (first + self.work.whole + self.work.head + passes)

    @torch.no_grad()
    def run(self, report: Callable[[int], None] = lambda units: None) -> SplitMeasurement:
        """Both passes; `report` is told the units of `Work` done since it was last called.

        Raises:
            CorpusError: the split is too small for its figures to exist.
            ModelError: an ablation leaves the loss as it is, so that CE recovered does not exist.
        """
        self.report = report
        first = self.first or self._first_pass()
        if self.first is None:
            self._look_up_ablations(first)
        self.kept = torch.split(first["kept"], [len(one.token_ids) for one in self.conversations])
        left_out = dict(zip(LEFT_OUT, first["left_out"].tolist(), strict=True))
        self.means_D = {site: first[site.name].to(self.lm.device) for site in self.hooked}
        batches = self._batches(range(len(self.conversations)))
        followed = set(range(0, len(batches), max(1, len(batches) // STATE_BATCHES)))
        for number, batch in enumerate(batches):
            self._measure(batch, follow_state="deltanet" in self.lm.layer_kinds and number in followed)
        self._keep(first)
        sums = {sae_id: self._sums(sae_id) for sae_id in self.saes}
        return SplitMeasurement(
            figures={sae_id: self._figures(sae_id, sums[sae_id], left_out) for sae_id in self.saes},
            sums=sums,
            fired_N={sae_id: fidelity.fired_N.cpu() for sae_id, fidelity in self.fidelity.items()},
            routing={sae_id: shift.figures() for sae_id, shift in self.routing.items() if shift.overlap},
            states={sae_id: shift.figures() for sae_id, shift in self.states.items() if shift.shifts},
        )

    def _sums(self, sae_id: str) -> Sums:
        found = {name: value_C.cpu().numpy() for name, value_C in self.sums[sae_id].items()}
        if sae_id not in self.spliced:
            return found | dict.fromkeys(SPLICE_SUMS, np.full(len(self.conversations), np.nan))
        return found | {name: value_C.cpu().numpy() for name, value_C in self.ablations[self.spliced[sae_id]].items()}

    def _first_pass(self) -> dict[str, Tensor]:
        """Which tokens are `kept` (bool, of all conversations in turn), `left_out` by reason, the mean of each site."""
        kept = [torch.zeros(len(conversation.token_ids), dtype=torch.bool) for conversation in self.conversations]
        moments = {site: Moments(self.lm.width(site), self.lm.device) for site in self.hooked}
        left_out: Counter[str] = Counter()
        for start, window in self._windows():
            rows = harvest(self.lm, window, self.hooked, self.recipe.activations, self.recipe.corpus.batch_tokens)
            for member in range(len(window)):
                kept[start + member][rows.position_R[rows.conversation_R == member].long()] = True
            for site, x_RD in rows.rows.items():
                for part_RD in torch.split(x_RD, ENCODE_ROWS):
                    moments[site].update(part_RD)
            left_out.update(rows.left_out)
            self.report(self.work.up_to(self.hooked[-1]) * sum(len(one.token_ids) for one in window))
        return {
            "kept": torch.cat(kept),
            "left_out": torch.tensor([left_out[reason] for reason in LEFT_OUT]),
            **{site.name: moment.mean.cpu() for site, moment in moments.items()},
        }

    def _look_up_ablations(self, first: Mapping[str, Tensor] | None) -> None:
        """Take the sums of ablations that are known; `ablated` are the other sites, which this evaluation measures."""
        self.ablations: dict[Site, dict[str, Tensor]] = {site: {} for site in sorted(set(self.spliced.values()))}
        if self.cache is not None and first is not None:
            for site in self.ablations:
                self.ablations[site] = self.cache.get(self.conversations, _ablation_key(site, first)) or {}
        self.ablated = tuple(site for site, sums in self.ablations.items() if not sums)

    def _keep(self, first: Mapping[str, Tensor]) -> None:
        """Keep for the next evaluation what this one had to measure and holds of no SAE."""
        if self.cache is None:
            return
        if self.first is None:
            self.cache.put(self.conversations, self._rows_key(), first)
        for site in self.ablated:
            self.cache.put(self.conversations, _ablation_key(site, first), self.ablations[site])

    def _rows_key(self) -> dict[str, Any]:
        """What decides, with the conversations, which rows are kept, and their means."""
        rule = self.recipe.activations.model_dump(mode="json", exclude={"cache", "overlap"})
        return {"rows": [site.name for site in self.hooked], "activations": rule}

    def _windows(self) -> Iterator[tuple[int, list[Conversation]]]:
        """Conversations in runs of about one training window, each with the position of its first."""
        start, tokens, window = 0, 0, list[Conversation]()
        for position, conversation in enumerate(self.conversations):
            window.append(conversation)
            tokens += len(conversation.token_ids)
            if tokens >= self.recipe.activations.window_tokens or position + 1 == len(self.conversations):
                yield start, window
                start, tokens, window = position + 1, 0, []

    def _batches(self, members: Sequence[int]) -> list[Batch]:
        token_ids = [self.conversations[member].token_ids for member in members]
        lengths, pad_id = [len(ids) for ids in token_ids], self.lm.tokenizer.pad_token_id or 0
        return make_batches(lengths, token_ids, self.recipe.corpus.batch_tokens, pad_id, self.lm.device)

    def _measure(self, batch: Batch, *, follow_state: bool) -> None:
        """Everything about one batch."""
        clean_routing: dict[int, Tensor] = {}
        with watch_routers(self.routers, clean_routing.__setitem__):
            clean = clean_pass(self.lm, batch, self.recorded)
        differences = [site for site in self.hooked if site.is_difference]
        found = self.lm.streams(batch.input_ids_CT, batch.lengths_C, differences) if differences else {}
        rows = clean.recording.rows | found
        kept_CT = self._padded([self.kept[member] for member in batch.members], clean)
        roles = [torch.from_numpy(self.conversations[member].roles) for member in batch.members]
        roles_R = self._padded(roles, clean)[kept_CT]
        special_R = torch.isin(batch.input_ids_CT.to(self.lm.device)[kept_CT], self.special_ids)
        real_R = clean.real_CT.flatten().nonzero().squeeze(1)
        variants: dict[tuple[str, str | Site], Tensor] = {}
        self.report(len(clean.target_P) * self.work.whole)
        for site in self.ablated:
            mean_D = self.means_D[site]
            for name, value_D in (("zero_ablation", torch.zeros_like(mean_D)), ("mean_ablation", mean_D)):
                ablated_CTD = replaced(rows[site], kept_CT, value_D)
                variants[name, site] = self._variant(clean, site, ablated_CTD)
        for sae_id, site in self.targets.items():
            x_hat_RD = self._reconstruct(sae_id, batch, rows, kept_CT, roles_R, special_R)
            if sae_id not in self.spliced:
                continue
            x_CTD = replaced(rows[site], kept_CT, x_hat_RD)
            above = {layer: router for layer, router in self.routers.items() if before_router(site, layer)}
            routing: dict[int, Tensor] = {}
            with watch_routers(above, routing.__setitem__):
                variants["spliced", sae_id] = self._variant(clean, site, x_CTD)
            self.routing[sae_id].update(self.routers, clean_routing, routing, real_R)
        if follow_state:
            self._follow_state(batch, kept_CT)
        self._add_losses(batch, clean, variants)

    def _variant(self, clean: CleanPass, site: Site, edited_CTD: Tensor) -> Tensor:
        hidden_PD = variant_pass(self.lm, clean, site, edited_CTD)
        self.report(len(hidden_PD) * (self.work.from_([site]) - self.work.head))
        return hidden_PD

    def _follow_state(self, batch: Batch, kept_CT: Tensor) -> None:
        """Recurrent state at the end of the batch's first conversations, all cut to the shortest of these."""
        length = min(batch.lengths_C[:STATE_ROWS])
        kept_CT = kept_CT[:STATE_ROWS, :length]

        def splice(sae_id: str, rows: Mapping[Site, Tensor]) -> Tensor:
            x_hat_RD = self.saes[sae_id](rows[self.sites[sae_id]][kept_CT])
            return replaced(rows[self.targets[sae_id]], kept_CT, x_hat_RD)

        ids_CT = batch.input_ids_CT[:STATE_ROWS, :length]
        add_state_shifts(self.lm, ids_CT, self.recorded, self.spliced, splice, self.states)

    def _padded(self, values: Sequence[Tensor], clean: CleanPass) -> Tensor:
        """One tensor [T] per conversation as [C, T]; padding is 0."""
        padded_CT = torch.zeros(clean.real_CT.shape, dtype=values[0].dtype)
        for row_T, value_T in zip(padded_CT, values, strict=True):
            row_T[: len(value_T)] = value_T
        return padded_CT.to(self.lm.device, non_blocking=True)

    def _reconstruct(
        self,
        sae_id: str,
        batch: Batch,
        rows: Mapping[Site, Tensor],
        kept_CT: Tensor,
        roles_R: Tensor,
        special_R: Tensor,
    ) -> Tensor:
        """Reconstruct the kept rows and add them to the SAE's fidelity and sums; the reconstructions [R, D]."""
        sae, site, target = self.saes[sae_id], self.sites[sae_id], self.targets[sae_id]
        read_RD, x_RD, mean_D = rows[site][kept_CT], rows[target][kept_CT], self.means_D[target]
        conversation_R = self._members(batch)[kept_CT.nonzero()[:, 0]]
        x_hat_RD = torch.empty(x_RD.shape, dtype=torch.float32, device=x_RD.device)
        for start in range(0, len(x_RD), ENCODE_ROWS):
            part = slice(start, start + ENCODE_ROWS)
            codes = sae.encode(read_RD[part])
            x_hat_RD[part] = sae.reconstruct(read_RD[part], codes)
            self.fidelity[sae_id].update(x_RD[part], codes, x_hat_RD[part], roles_R[part], special_R[part])
            if sae_id in self.projections:
                self.projections[sae_id].update(x_RD[part])
            x_BD = x_RD[part].double()
            residual_B = (x_BD - x_hat_RD[part].double()).square_().sum(1)
            sums = self.sums[sae_id]
            self._add(sums, "residual", conversation_R[part], residual_B)
            self._add(sums, "deviation", conversation_R[part], (x_BD - mean_D).square_().sum(1))
        return x_hat_RD

    def _add_losses(self, batch: Batch, clean: CleanPass, variants: Mapping[tuple[str, str | Site], Tensor]) -> None:
        head = self.work.head
        clean_ce_P, scored = losses(self.lm, clean, variants, on_rows=lambda rows: self.report(rows * head))
        conversation_P = self._members(batch)[clean.row_P]
        for sums in self.sums.values():
            self._add(sums, "predicted", conversation_P, torch.ones_like(clean_ce_P))
            self._add(sums, "ce_clean", conversation_P, clean_ce_P)
        for (variant, where), found in scored.items():
            sums = self.ablations[where] if isinstance(where, Site) else self.sums[where]
            self._add(sums, f"ce_{variant}", conversation_P, found.ce_P)
            self._add(sums, f"kl_{variant}", conversation_P, found.kl_P)

    def _members(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.members, device=self.lm.device)

    def _add(self, sums: dict[str, Tensor], name: str, conversation_B: Tensor, value_B: Tensor) -> None:
        """Add values to their conversations' sums."""
        empty_C = torch.zeros(len(self.conversations), dtype=torch.float64, device=self.lm.device)
        sums.setdefault(name, empty_C).index_add_(0, conversation_B, value_B)

    def _figures(self, sae_id: str, sums: Sums, left_out: Mapping[str, int]) -> dict[str, Any]:
        fidelity = self.fidelity[sae_id].figures()
        predicted = float(sums["predicted"].sum())
        if fidelity["fvu"] is None or not predicted:
            split = self.conversations[0].split
            raise CorpusError(
                f"split {split} has {fidelity['tokens']} usable tokens in {len(self.conversations)} conversations, "
                "too few to measure; give more data"
            )
        mean = {name: float(value_C.sum()) / predicted for name, value_C in sums.items()}
        projections = self.projections.get(sae_id)
        figures = fidelity | {
            "nth_decoder_projection": projections and projections.figures(self.fidelity[sae_id].spread),
            "conversations": len(self.conversations),
            "left_out": dict(left_out),
            "predicted_tokens": int(predicted),
            "ce_clean": mean["ce_clean"],
            "ce_spliced": mean["ce_spliced"],
            "ce_zero_ablation": mean["ce_zero_ablation"],
            "ce_mean_ablation": mean["ce_mean_ablation"],
            "ce_recovered_zero": self._recovered(sae_id, mean, "zero"),
            "ce_recovered_mean": self._recovered(sae_id, mean, "mean"),
            "kl": mean["kl_spliced"],
            "kl_zero_ablation": mean["kl_zero_ablation"],
            "kl_mean_ablation": mean["kl_mean_ablation"],
        }
        if sae_id in self.spliced:
            return figures
        return {name: None if value != value else value for name, value in figures.items()}  # NaN is unlike itself

    def _recovered(self, sae_id: str, mean: Mapping[str, float], baseline: str) -> float:
        lost = mean[f"ce_{baseline}_ablation"] - mean["ce_clean"]
        if lost == 0:
            raise ModelError(
                f"{baseline} ablation at {self.targets[sae_id]} ({sae_id}) leaves the loss of {self.lm.name} "
                "as it is, so CE recovered does not exist; hook a site that the model uses"
            )
        return (mean[f"ce_{baseline}_ablation"] - mean["ce_spliced"]) / lost


def _ablation_key(site: Site, first: Mapping[str, Tensor]) -> dict[str, Any]:
    """What decides, with the conversations, how ablations at a site turn out: the kept rows and their mean."""
    rows = hashlib.sha256(first["kept"].numpy().tobytes() + first[site.name].numpy().tobytes())
    return {"ablation": site.name, "rows": rows.hexdigest()}
