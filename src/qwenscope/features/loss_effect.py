"""What a latent does for the next token's loss where it fires: ablated in texts of its own examples, beside controls.

In whole conversations of the index, up to the tokens that its examples show, the latent's contribution a(x) d is taken
away at every position where it fires (d its decoder column); what counts is the change of the next token's loss at
those positions, in nats. Controls take away as much (the same norm at the same positions) along another latent that
fires in the index, and along a random direction; each is drawn DRAWS times. The interval is a 95 % bootstrap over
conversations.

Legend: C conversations of a batch, T positions, D hidden, P positions that count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qwenscope.errors import FormatError
from qwenscope.features.store import Index
from qwenscope.lm.batches import make_batches
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.splice import clean_pass, losses, variant_pass
from qwenscope.opening import Target
from qwenscope.seeds import generator

TOKENS = 2048
"""Read at most, over all conversations."""
LONGEST = 512
"""An example that lies deeper in its conversation is left out."""
DRAWS = 2
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class LossEffect:
    """Changes of loss are ablated minus clean: above 0, the latent helps to predict."""

    positions: int
    conversations: int
    loss: float
    """Mean of the clean model there."""
    change: float
    interval: tuple[float, float]
    random_latent: list[float]
    """Mean change of each draw."""
    random_direction: list[float]


@torch.no_grad()
def loss_effect(index: Index, target: Target, lm: LanguageModel, sae_id: str, latent: int, seed: int = 0) -> LossEffect:
    """Ablate a latent in its own examples.

    Args:
        index: of the SAEs.
        target: the SAEs.
        lm: their whole language model with its LM head.
        sae_id: one of them.
        latent: its.
        seed: of which examples are taken, of the controls and of the bootstrap.

    Raises:
        FormatError: a transcoder, or the latent fires in no example near enough to its conversation's beginning.
        ModelError: the model was loaded truncated or without LM head.
    """
    sae, site = target.saes[sae_id], target.sites[sae_id]
    if "target" in sae.config:
        raise FormatError(f"{sae_id} is a transcoder: its latents add to what they predict, nothing is taken away")
    random = generator(seed, "loss effect")
    texts = _texts(index, sae_id, latent, random)
    column_D = sae.decoder.weight.detach()[:, latent].float()
    directions = {"own": column_D, **_controls(index, sae_id, sae.decoder.weight.detach().float(), latent, random)}
    found: dict[str, list[NDArray[Any]]] = {name: [] for name in ("row", "clean", *directions)}
    for batch in make_batches([len(ids) for ids in texts], texts, max(TOKENS, LONGEST), 0, lm.device):
        clean = clean_pass(lm, batch, [site])
        rows_CTD = clean.recording.rows[site]
        codes = sae.encode(rows_CTD.to(sae.pre_bias.device))
        active_CT = ((codes.values * (codes.indices == latent)).sum(-1)).to(rows_CTD.device)
        active_CT[:, 0] = 0.0  # a sink in many models
        counts_P = (active_CT > 0)[clean.predicting]
        if not bool(counts_P.any()):
            continue
        hidden = {}
        for name, direction_D in directions.items():
            edited_CTD = rows_CTD.float() - active_CT.unsqueeze(-1) * direction_D.to(rows_CTD.device)
            hidden[name] = variant_pass(lm, clean, site, edited_CTD.to(rows_CTD.dtype))[counts_P]
        parts = {name: getattr(clean, name)[counts_P] for name in ("hidden_PD", "target_P", "row_P")}
        clean_P, variants = losses(lm, replace(clean, **parts), hidden)
        found["row"].append(np.array(batch.members)[parts["row_P"].cpu().numpy()])
        found["clean"].append(clean_P.cpu().numpy())
        for name, variant in variants.items():
            found[name].append((variant.ce_P - clean_P).cpu().numpy())
    if not found["row"]:
        raise FormatError(f"latent {latent} of {sae_id} fires in none of its examples that can be read whole")
    whole = {name: np.concatenate(parts) for name, parts in found.items()}
    means = {name: float(whole[name].mean()) for name in whole}
    return LossEffect(
        positions=len(whole["row"]),
        conversations=len(np.unique(whole["row"])),
        loss=means["clean"],
        change=means["own"],
        interval=_interval(whole["own"], whole["row"], seed),
        random_latent=[means[f"latent {draw}"] for draw in range(DRAWS)],
        random_direction=[means[f"direction {draw}"] for draw in range(DRAWS)],
    )


def _texts(index: Index, sae_id: str, latent: int, random: torch.Generator) -> list[NDArray[np.int32]]:
    """Token ids of conversations up to the token behind an example's peak, of examples in random order, TOKENS of them
    in all; of one conversation the longest part."""
    ends: dict[int, int] = {}
    examples = [each for each in index.latent(sae_id, latent)["examples"] if each["kind"] != "negative"]
    for place in torch.randperm(len(examples), generator=random).tolist():
        start, end = examples[place]["start"], examples[place]["position"] + 2
        longer = {**ends, start: max(end, ends.get(start, 0))}
        if end <= LONGEST and sum(longer.values()) <= TOKENS:
            ends = longer
    if not ends:
        raise FormatError(f"latent {latent} of {sae_id} has no example within {LONGEST} tokens of a beginning")
    return [np.array(index.conversation(start)["ids"][:end], dtype=np.int32) for start, end in ends.items()]


def _controls(index: Index, sae_id: str, decoder_DN: Tensor, latent: int, random: torch.Generator) -> dict[str, Tensor]:
    """Directions as long as the latent's own column."""
    length = decoder_DN[:, latent].norm()
    others = [other for other in index.alive(sae_id) if other != latent]
    if not others:
        raise FormatError(f"no other latent of {sae_id} fires, so there is nothing to compare with")
    found = {}
    for draw in range(DRAWS):
        other = others[int(torch.randint(len(others), (1,), generator=random))]
        noise_D = torch.randn(len(decoder_DN), generator=random, dtype=torch.float32)
        for name, direction_D in ((f"latent {draw}", decoder_DN[:, other]), (f"direction {draw}", noise_D)):
            found[name] = length * nn.functional.normalize(direction_D.to(length.device), dim=0)
    return found


def _interval(change_P: NDArray[np.float64], row_P: NDArray[Any], seed: int) -> tuple[float, float]:
    """95 % of the means of conversations drawn with replacement."""
    _, place_P = np.unique(row_P, return_inverse=True)
    sums, counts = np.bincount(place_P, change_P), np.bincount(place_P)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(BOOTSTRAPS, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)
