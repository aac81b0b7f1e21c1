"""Where a latent acts: at prefill or at decode, on which experts, and how far on a hybrid model's recurrent states.

    from qwenscope.analysis.trace import trace

    trace("runs/demo", sae="sae_attn_mid", latent=40, strength=0.3)

Everything stands beside random directions that are added at the same strength. Conversations are read as they are, not
written on; the unsteered pass of a batch is computed once. Definitions: docs/analysis.md.

Legend: C conversations, T positions, D hidden, R tokens that count, P predicting positions, A tokens from the beginning
of an answer, X pushes (the latent's, then random directions) at each of PLACES, S bootstrap samples.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenscope.analysis.contrast import OnProgress, chosen_saes
from qwenscope.analysis.experts import Added, Firing, choices
from qwenscope.analysis.heads import head
from qwenscope.analysis.pooling import Scope
from qwenscope.analysis.recurrence import AFTER, state_changes
from qwenscope.corpus.conversation import ROLES, Conversation
from qwenscope.errors import CorpusError, FormatError
from qwenscope.evaluation.downstream import before_router
from qwenscope.evaluation.pairs import interval, resample
from qwenscope.features.steering import Steering
from qwenscope.files import write_json
from qwenscope.lm.batches import Batch, make_batches
from qwenscope.lm.hooks import find_routers, watch_routers
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.lm.splice import CleanPass, clean_pass, losses, variant_pass
from qwenscope.opening import Target, as_target
from qwenscope.sae.sae import SAE
from qwenscope.seeds import generator
from qwenscope.training.lock import sole_writer

STRENGTH = 0.3
"""In norms of the row, as in the steering file of a contrast."""
RANDOM = 5
"""Random directions."""
TOKENS = 5_000
"""Of each split."""
FOLLOWED = 8
"""Conversations whose recurrent states are followed."""
PLACES = ("all", "prefill", "decode")
_ANSWER = [ROLES.index(role) for role in ("assistant", "tool_call", "think")]
_ASKED = [ROLES.index(role) for role in ("system", "user", "tool_result")]


@dataclass(frozen=True)
class Reading:
    """A conversation up to the end of its last answer; of a document, all of it."""

    token_ids: NDArray[np.int32]
    roles: NDArray[np.uint8]
    start: int
    """Position of the answer's first token; of a document, the middle."""

    @staticmethod
    def of(conversation: Conversation) -> Reading | None:
        """None where nothing stands before an answer, or nothing is answered."""
        ids, roles = conversation.token_ids, conversation.roles
        answered = np.flatnonzero(np.isin(roles, _ANSWER))
        if not len(answered):
            return Reading(ids, roles, len(ids) // 2) if len(ids) > 1 and conversation.split == "text" else None
        asked = np.flatnonzero(np.isin(roles[: answered[-1]], _ASKED))
        start = int(answered[answered > (asked[-1] if len(asked) else -1)][0])
        stop = int(answered[-1]) + 2  # with the token that ends the turn
        return Reading(ids[:stop], roles[:stop], start) if start else None


def trace(
    target: str | Path | Target,
    *,
    sae: str,
    latent: int | None = None,
    along: Tensor | None = None,
    strength: float = STRENGTH,
    data: Path | None = None,
    tokens: int = TOKENS,
    out: Path | None = None,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Measure what a latent, or a direction, does to the model above its site.

    Args:
        target: what `open_target` takes, or what it gave.
        sae: id of the SAE whose latent is traced, or at whose site a direction is added.
        latent: of that SAE.
        along: instead of a latent, a direction [D] of any length.
        strength: how far is pushed, in norms of the row.
        data: conversations or documents; None takes those held out from training.
        tokens: read of each split at most.
        out: file to write the result to as JSON.
        on_progress: called with (phase, done, total).

    Returns:
        docs/analysis.md says what the keys mean.

    Raises:
        FormatError: an SAE or a latent that is not there, a strength of 0, a direction of another width.
        CorpusError: nothing to read, or no conversation has an answer.
        LockError: another process writes `out`.
    """
    with sole_writer(out):
        opened = as_target(target)
        chosen_saes(opened, [sae])
        if not strength:
            raise FormatError("a push of strength 0 changes nothing; give another --strength")
        coder, site = opened.saes[sae], opened.targets[sae]
        named: dict[str, Any] = {"sae": coder, "latent": latent} if along is None else {"along": along}
        push = Steering(site=site, strength=strength, **named)
        lm = opened.language_model()
        if len(push.direction_D) != (width := lm.width(site)):
            raise FormatError(f"a direction of {len(push.direction_D)} cannot be added at {site}, {width} wide")
        readings, pushes = _readings(opened, lm, tokens, data), [push, *_at_random(push, opened.recipe.seed)]
        asked = {"sae": sae, "latent": latent, "site": site.name, "strength": strength, "random_directions": RANDOM}
        tracing = _Tracing(opened, lm, readings, pushes, opened.sites[sae], coder if along is None else None)
        result = head("trace", opened, [sae]) | asked | tracing.run(on_progress)
        if out is not None:
            write_json(out, result)
    return result


def _readings(target: Target, lm: LanguageModel, tokens: int, data: Path | None) -> list[Reading]:
    conversations = itertools.chain(*target.splits(lm.tokenizer, tokens, data).values())
    readings = [one for each in conversations if (one := Reading.of(each)) is not None]
    if not readings:
        raise CorpusError(f"{data or 'what was held out'}: no conversation has an answer; give others with --data")
    return readings


def _longest(readings: Sequence[Reading]) -> list[tuple[list[int], int]]:
    """The conversations whose states are followed: those with the longest answers."""
    chosen = sorted(readings, key=lambda one: -min(AFTER, len(one.token_ids) - one.start))[:FOLLOWED]
    return [(one.token_ids.tolist(), one.start) for one in chosen]


def _at_random(push: Steering, seed: int) -> list[Steering]:
    random = generator(seed, "traced directions")
    width = len(push.direction_D)
    return [
        dataclasses.replace(push, along=torch.randn(width, generator=random, dtype=torch.float32))
        for _ in range(RANDOM)
    ]


class _Tracing:
    """Running sums over batches."""

    def __init__(
        self,
        target: Target,
        lm: LanguageModel,
        readings: Sequence[Reading],
        pushes: Sequence[Steering],
        read: Site,
        sae: SAE | None,
    ) -> None:
        self.lm, self.readings, self.pushes, self.read, self.sae = lm, readings, pushes, read, sae
        self.latent = pushes[0].latent
        self.site = Site.of(pushes[0].site)  # type: ignore[arg-type] # it is one by now
        self.recipe = target.recipe
        self.routers = {layer: router for layer, router in find_routers(lm).items() if before_router(self.site, layer)}
        self.firing = Firing({layer: len(router.weight) for layer, router in self.routers.items()})  # type: ignore[arg-type]
        self.added = Added(self.routers)
        shape = len(PLACES) * len(pushes)
        self.kl_XC = torch.zeros(shape, len(readings), dtype=torch.float64)
        self.kl_XA = torch.zeros(shape, AFTER, dtype=torch.float64)
        self.tokens_C = torch.tensor([len(one.token_ids) - one.start for one in readings], dtype=torch.float64)

    def run(self, on_progress: OnProgress) -> dict[str, Any]:
        """What is found over all batches."""
        ids = [one.token_ids for one in self.readings]
        lengths, pad, done = [len(each) for each in ids], self.lm.tokenizer.pad_token_id or 0, 0
        for batch in make_batches(lengths, ids, self.recipe.corpus.batch_tokens, pad, self.lm.device):
            self._measure(batch)
            done += len(batch.members)
            on_progress("tracing", done, len(ids))
        on_progress("following states", 0, 1)
        states = state_changes(self.lm, _longest(self.readings), self.pushes, PLACES)
        on_progress("following states", 1, 1)
        seed = self.recipe.seed
        return {
            "conversations": len(ids),
            "tokens": sum(map(len, ids)),
            "output": self.output(seed),
            "routing": self.routing(seed),
            "state": states,
        }

    @torch.no_grad()
    def _measure(self, batch: Batch) -> None:
        routing: dict[int, Tensor] = {}
        with watch_routers(self.routers, routing.__setitem__):
            clean = clean_pass(self.lm, batch, {self.site, self.read})
        x_CTD = clean.recording.rows[self.site]
        start_C1 = torch.tensor([[self.readings[member].start] for member in batch.members], device=x_CTD.device)
        decode_CT = torch.arange(x_CTD.shape[1], device=x_CTD.device) >= start_C1
        masks = {"all": torch.ones_like(decode_CT), "prefill": ~decode_CT, "decode": decode_CT}
        pushed: list[dict[int, Tensor]] = [{} for _ in self.pushes]
        hidden: dict[int, Tensor] = {}
        for number, push in enumerate(self.pushes):
            push_CTD = push.push(x_CTD)
            for place, mask_CT in enumerate(masks.values()):
                edited_CTD = (x_CTD.float() + push_CTD * mask_CT.unsqueeze(2)).to(x_CTD.dtype)
                seen = pushed[number] if place == 0 else dict[int, Tensor]()
                with watch_routers(self.routers, seen.__setitem__):
                    hidden[place * len(self.pushes) + number] = variant_pass(self.lm, clean, self.site, edited_CTD)
        self._add_losses(batch, clean, hidden, start_C1)
        if self.routers:
            counts_CT = self._counts(batch, clean)
            rows_R = counts_CT.flatten().nonzero().squeeze(1)
            self.added.add(routing, pushed, rows_R)
            if self.sae is not None:
                codes = self.sae.encode(clean.recording.rows[self.read][counts_CT].float())
                fires_R = ((codes.indices == self.latent) & (codes.values > 0)).any(1)
                member_R = torch.tensor(batch.members, device=rows_R.device)[counts_CT.nonzero()[:, 0]]
                token_R = batch.input_ids_CT.to(rows_R.device)[counts_CT]
                self.firing.add(choices(routing, self.routers, rows_R), fires_R, member_R * (1 << 32) + token_R)

    def _counts(self, batch: Batch, clean: CleanPass) -> Tensor:
        """bool [C, T]: tokens that SAEs were trained on, but for the first."""
        counts_CT = torch.zeros(clean.real_CT.shape, dtype=torch.bool)
        for row_T, member in zip(counts_CT, batch.members, strict=True):
            roles_T = self.readings[member].roles
            row_T[: len(roles_T)] = torch.from_numpy(Scope().mask(roles_T, self.recipe.activations.skip_roles))
        return counts_CT.to(self.lm.device)

    def _add_losses(self, batch: Batch, clean: CleanPass, hidden: Mapping[int, Tensor], start_C1: Tensor) -> None:
        """KL of each variant where a token of an answer is predicted."""
        position_P = clean.predicting.nonzero()[:, 1]
        since_P = position_P + 1 - start_C1[clean.row_P, 0]
        answer_P = since_P >= 0
        answers = dataclasses.replace(
            clean,
            hidden_PD=clean.hidden_PD[answer_P],
            target_P=clean.target_P[answer_P],
            row_P=clean.row_P[answer_P],
        )
        _, found = losses(self.lm, answers, {number: hidden_PD[answer_P] for number, hidden_PD in hidden.items()})
        member_P = torch.tensor(batch.members)[answers.row_P.cpu()]
        near_P = (since_P := since_P[answer_P].cpu()) < AFTER
        for number, each in found.items():
            kl_P = each.kl_P.cpu()
            self.kl_XC[number].index_add_(0, member_P, kl_P)
            self.kl_XA[number].index_add_(0, since_P[near_P], kl_P[near_P])

    def output(self, seed: int) -> dict[str, Any]:
        """KL by where the push is, with intervals over conversations, beside random directions."""
        count, pushes = len(self.readings), len(self.pushes)
        weights_SC = torch.from_numpy(resample(count, seed))
        tokens_S = weights_SC @ self.tokens_C
        reached_A = torch.stack([(self.tokens_C > since).sum() for since in range(AFTER)])
        shown = int((reached_A > 0).sum())
        result: dict[str, Any] = {"tokens": int(self.tokens_C.sum()), "positions": {}}
        for number, place in enumerate(PLACES):
            here = slice(number * pushes, (number + 1) * pushes)
            own_C, random_XC = self.kl_XC[here][0], self.kl_XC[here][1:]
            beyond_C = own_C - random_XC.mean(0)
            by_token_XA = (self.kl_XA[here] / reached_A)[:, :shown]
            result["positions"][place] = {
                "kl": float(own_C.sum() / self.tokens_C.sum()),
                "interval": _drawn(own_C, weights_SC, tokens_S),
                "random": (random_XC.sum(1) / self.tokens_C.sum()).tolist(),
                "beyond_random": float(beyond_C.sum() / self.tokens_C.sum()),
                "beyond_random_interval": _drawn(beyond_C, weights_SC, tokens_S),
                "by_token": {"latent": by_token_XA[0].tolist(), "random": by_token_XA[1:].mean(0).tolist()},
            }
        return result

    def routing(self, seed: int) -> dict[str, Any] | None:
        """Experts where the latent fires and where it is added; None without a router above the site."""
        if not self.routers:
            return None
        return {"fires": None if self.sae is None else self.firing.figures(seed), "added": self.added.figures()}


def _drawn(sum_C: Tensor, weights_SC: Tensor, tokens_S: Tensor) -> list[float] | None:
    return interval((weights_SC @ sum_C / tokens_S).numpy()) if len(sum_C) > 1 else None
