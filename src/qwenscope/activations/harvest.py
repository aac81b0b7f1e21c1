"""From conversations to residual-stream rows: one truncated pass per batch, all hook points at once."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenscope.corpus.conversation import ROLES
from qwenscope.errors import TrainingError
from qwenscope.lm.batches import Batch, make_batches
from qwenscope.lm.model import RowSource
from qwenscope.lm.sites import Site
from qwenscope.machine import memory_errors_named
from qwenscope.parallel.harvest_plan import HarvestPlan
from qwenscope.recipe import ActivationsRecipe

NON_FINITE_LIMIT = 0.01
"""Share of non-finite rows at one hook point above which the model, not the row, is at fault."""
LEFT_OUT = ("first_position", "role", "repeated", "non_finite", "outlier")
"""Why a token is left out; one that there are several reasons for counts for the first."""
_LESS_MEMORY = "lower corpus.batch_tokens or activations.window_tokens, or set activations.overlap to false"


class HasTokens(Protocol):
    """What is harvested: a Conversation, or its tokens alone."""

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """[T], at least one."""

    @property
    def roles(self) -> NDArray[np.uint8]:
        """[T], codes of ROLES."""


@dataclass(eq=False)
class Harvest:
    """Kept rows of some conversations, the same tokens at every hook point.

    R: kept tokens in canonical order (by conversation, then by position); D: hidden dimension.
    """

    rows: dict[Site, Tensor]
    """{site: x_RD} in the language model's dtype, on its device; of several ranks, at the sites this one owns."""
    conversation_R: Tensor
    """int32 on the CPU: position in the list of conversations."""
    position_R: Tensor
    """int32 on the CPU: position in the conversation."""
    left_out: dict[str, int]
    """Tokens left out, by each reason of LEFT_OUT."""
    padding_share: float
    """Padding in the language model's batches over all their positions."""


def harvest(
    lm: RowSource,
    conversations: Sequence[HasTokens],
    sites: Sequence[Site],
    activations: ActivationsRecipe,
    batch_tokens: int,
    names: Mapping[Site, str] | None = None,
    plan: HarvestPlan[Site] | None = None,
    room: int = 0,
) -> Harvest:
    """Rows of every token of `conversations` at each of `sites`.

    Left out, at all hook points together and counted: what the recipe skips (first positions, roles, repeated
    beginnings); rows with a non-finite value at any hook point; rows whose norm exceeds `outlier_factor` times the
    median norm at that hook point over these very conversations (attention sinks reach 100 times it).

    Args:
        lm: Built up to the last of `sites`.
        conversations: One row each; nothing leaks between them.
        sites: Hooked ones.
        activations: Which rows are left out.
        batch_tokens: Token budget of one language-model batch, padding included.
        names: {site: hook point} for messages.
        plan: Among several ranks, which all call this with the same conversations; None is one process alone.
        room: Rows that memory is taken for, where they are more: windows that ask for blocks of one size get those of
            the windows before them, while blocks of unlike sizes would fill a GPU's memory with gaps.

    Raises:
        TrainingError: more than 1 % non-finite rows; names the hook point.
        ResourceError: the rows, or a pass of the model, do not fit the device.
    """
    plan = plan or HarvestPlan.alone(sites)
    rank = plan.group.rank
    lengths = [len(conversation.token_ids) for conversation in conversations]
    pad_id = lm.tokenizer.pad_token_id or 0  # any id does: padding reaches no token before it
    token_ids = [conversation.token_ids for conversation in conversations]
    batches = make_batches(lengths, token_ids, batch_tokens, pad_id, lm.device)
    positions = [batch.input_ids_CT.numel() for batch in batches]
    dealt = plan.deal(positions)
    rank_C = torch.empty(len(lengths), dtype=torch.int64)  # who harvests each conversation
    for batch, one in zip(batches, dealt, strict=True):
        rank_C[batch.members] = one
    own = [batch for batch, one in zip(batches, dealt, strict=True) if one == rank]
    own_lengths = {c: lengths[c] for c in (rank_C == rank).nonzero().squeeze(1).tolist()}
    with memory_errors_named(f"a window of {sum(lengths):,} tokens", _LESS_MEMORY):
        rows, norms = _forward(lm, own, own_lengths, sites, room)

    conversation_R, position_R = _places(lengths)
    rank_R = torch.repeat_interleave(rank_C, torch.tensor(lengths))
    keep_R, left_out = kept_rows(conversations, plan.norms_of_all(norms, rank_R), activations, names or {})
    if not bool(keep_R.all()):
        index = keep_R[rank_R == rank].nonzero().squeeze(1).to(lm.device, non_blocking=True)
        for site in sites:  # one hook point at a time: the peak is one window and one site
            kept = _buffer(lm, site, len(index), room)
            rows[site] = torch.index_select(rows[site], 0, index, out=kept)
        conversation_R, position_R, rank_R = conversation_R[keep_R], position_R[keep_R], rank_R[keep_R]
    rows = plan.rows_to_owners(rows, rank_R)
    return Harvest(rows, conversation_R, position_R, left_out, 1 - sum(lengths) / sum(positions))


def kept_rows(
    conversations: Sequence[HasTokens],
    norms: Mapping[Site, Tensor],
    activations: ActivationsRecipe,
    names: Mapping[Site, str],
) -> tuple[Tensor, dict[str, int]]:
    """Which rows of conversations are kept, given the norms [R] of all of them at each site, in canonical order.

    Returns:
        bool [R] on the CPU, and how many were left out, by each reason of LEFT_OUT.

    Raises:
        TrainingError: more than 1 % non-finite rows; names the hook point.
    """
    places = _places([len(conversation.token_ids) for conversation in conversations])
    return _kept(norms, _skipped(conversations, *places, activations), activations, names)


def _places(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Conversation and position of each row in canonical order, int32 [R]."""
    numbers_C = torch.arange(len(lengths), dtype=torch.int32)
    positions = [torch.arange(length, dtype=torch.int32) for length in lengths]
    return torch.repeat_interleave(numbers_C, torch.tensor(lengths)), torch.cat(positions)


def _buffer(lm: RowSource, site: Site, rows: int, room: int) -> Tensor:
    """Memory for so many rows of a site, and for as many more as make `room`."""
    return torch.empty(max(rows, room), lm.width(site), dtype=lm.dtype, device=lm.device)[:rows]


def _forward(
    lm: RowSource, batches: Sequence[Batch], lengths: Mapping[int, int], sites: Sequence[Site], room: int
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """{site: rows} and {site: norms} of the conversations in `batches`, whose {number: length} are `lengths`."""
    total, starts = 0, {}
    for member, length in lengths.items():
        starts[member] = total
        total += length
    rows = {site: _buffer(lm, site, total, room) for site in sites}
    norms = {site: torch.empty(total, device=lm.device, dtype=torch.float32) for site in sites}
    for batch in batches:
        streams = lm.streams(batch.input_ids_CT, batch.lengths_C, sites)
        places = list(zip(batch.members, batch.lengths_C, strict=True))
        longest = batch.input_ids_CT.shape[1]
        here_R = torch.cat([torch.arange(length) + c * longest for c, (_, length) in enumerate(places)])
        there_R = torch.cat([torch.arange(length) + starts[member] for member, length in places])
        here_R, there_R = (index.to(lm.device, non_blocking=True) for index in (here_R, there_R))
        for site, x_CTD in streams.items():  # all conversations of a batch at once: a GPU is slow at many small copies
            x_RD = x_CTD.flatten(0, 1)[here_R]
            rows[site][there_R] = x_RD
            norms[site][there_R] = torch.linalg.vector_norm(x_RD, dim=-1, dtype=torch.float32)
    return rows, norms


def _kept(
    norms: Mapping[Site, Tensor],
    skipped: Mapping[str, Tensor],
    activations: ActivationsRecipe,
    names: Mapping[Site, str],
) -> tuple[Tensor, dict[str, int]]:
    """Mask of rows kept at all hook points (bool on the CPU), and how many were left out for which reason.

    `skipped` holds those that the recipe skips whatever their values: {reason: bool [R]}, at most one True per row.
    """
    candidate_R = ~torch.stack(list(skipped.values())).any(0)
    total = int(candidate_R.sum())
    finite_R = candidate_R.clone()
    cpu_norms = dict(zip(norms, torch.stack(list(norms.values())).cpu(), strict=True))  # the device is waited for once
    for site, norm_R in cpu_norms.items():
        bad_R = candidate_R & ~norm_R.isfinite()
        if (bad := int(bad_R.sum())) > NON_FINITE_LIMIT * total:
            name = names.get(site, str(site))
            raise TrainingError(
                f"{bad:,} of {total:,} rows at hook point {name} are not finite; "
                "check the model's weights, or set lm.dtype to float32"
            )
        finite_R &= ~bad_R
    keep_R = finite_R.clone()
    if activations.outlier_factor is not None and bool(finite_R.any()):
        for norm_R in cpu_norms.values():
            keep_R &= ~(norm_R > activations.outlier_factor * norm_R[finite_R].median())
    left_out = {
        **{reason: int(skipped_R.sum()) for reason, skipped_R in skipped.items()},
        "non_finite": total - int(finite_R.sum()),
        "outlier": int(finite_R.sum()) - int(keep_R.sum()),
    }
    return keep_R, left_out


def _skipped(
    conversations: Sequence[HasTokens], conversation_R: Tensor, position_R: Tensor, activations: ActivationsRecipe
) -> dict[str, Tensor]:
    """{reason: bool [R]}, the rows that the recipe skips; each for its first reason."""
    none_R = torch.zeros_like(position_R, dtype=torch.bool)
    skipped = {"first_position": none_R, "role": none_R, "repeated": none_R}
    if activations.skip_first_position:
        skipped["first_position"] = position_R == 0
    if activations.skip_roles:
        roles_R = torch.from_numpy(np.concatenate([conversation.roles for conversation in conversations]))
        codes = torch.tensor([ROLES.index(role) for role in activations.skip_roles], dtype=torch.uint8)
        skipped["role"] = torch.isin(roles_R, codes) & ~skipped["first_position"]
    if activations.skip_repeated:
        repeated_C = torch.tensor(repeated_lengths([conversation.token_ids for conversation in conversations]))
        repeated_R = position_R < repeated_C[conversation_R.long()]
        skipped["repeated"] = repeated_R & ~skipped["first_position"] & ~skipped["role"]
    return skipped


def repeated_lengths(token_ids: Sequence[NDArray[np.int32]]) -> list[int]:
    """How many tokens each conversation begins with just as one before it does: rows of these are that one's rows.

    Among sorted texts the one with the longest common beginning is a neighbor.
    """
    seen: list[bytes] = []
    lengths = []
    for ids in token_ids:
        text = ids.astype(">i4").tobytes()  # bytes in the order of the ids, none of which is negative
        place = bisect(seen, text)
        lengths.append(max((_common(text, other) for other in seen[max(0, place - 1) : place + 1]), default=0))
        seen.insert(place, text)
    return lengths


def _common(first: bytes, second: bytes) -> int:
    """Tokens that two texts of `repeated_lengths` begin with alike."""
    shorter = min(len(first), len(second))
    unlike = np.frombuffer(first[:shorter], ">i4") != np.frombuffer(second[:shorter], ">i4")
    return int(unlike.argmax()) if unlike.any() else len(unlike)
