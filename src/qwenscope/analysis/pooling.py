"""From tokens to conversations: each latent's largest and mean activation, and on how many tokens it is above 0.

Legend: C conversations, R rows (kept tokens), T tokens of a conversation, N latents, D hidden, F any features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenscope.activations.harvest import Harvest, harvest
from qwenscope.corpus.conversation import ROLES, Conversation
from qwenscope.errors import FormatError
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.recipe import Recipe
from qwenscope.sae.sae import Codes

CHUNK_TOKENS = 65_536
"""Tokens whose rows are held at once."""


@dataclass(frozen=True)
class Scope:
    """Which tokens of a conversation count; its first position, where many models' attention sinks, never does."""

    roles: tuple[str, ...] = ()
    """Of these roles alone; none named: of all that the SAEs were trained on."""
    start: int | None = None
    stop: int | None = None
    """Positions among those tokens, as in Python's slices: -20 is the twentieth from the end."""

    def __post_init__(self) -> None:
        if unknown := [role for role in self.roles if role not in ROLES]:
            raise FormatError(f"there is no role {unknown[0]!r}; roles are {', '.join(ROLES)}")

    @staticmethod
    def of(roles: str | None, positions: str | None) -> Scope:
        """From a command line: `assistant,tool_call` and `10:200`.

        Raises:
            FormatError: an unknown role, or no range.
        """
        first, colon, last = (positions or ":").partition(":")
        try:
            if not colon:
                raise ValueError
            start, stop = (int(number) if number else None for number in (first, last))
        except ValueError:
            raise FormatError(f"positions {positions!r} are no range such as 10:200, :50 or -20:") from None
        return Scope(tuple(roles.split(",")) if roles else (), start, stop)

    def counted(self, skip_roles: Sequence[str] = ()) -> tuple[str, ...]:
        """The roles that count, `skip_roles` being those that the SAEs never saw."""
        return self.roles or tuple(role for role in ROLES if role not in skip_roles)

    def mask(self, roles_T: NDArray[np.uint8], skip_roles: Sequence[str] = ()) -> NDArray[np.bool_]:
        """bool [T]: which tokens count."""
        kept_T = np.isin(roles_T, [ROLES.index(role) for role in self.counted(skip_roles)])
        kept_T[:1] = False
        mask_T = np.zeros_like(kept_T)
        mask_T[np.flatnonzero(kept_T)[self.start : self.stop]] = True
        return mask_T


@dataclass
class Pool:
    """What is kept of F features per conversation."""

    max_CF: Tensor
    sum_CF: Tensor
    active_CF: Tensor
    """int32: on how many tokens the feature is above 0."""
    tokens_C: Tensor
    """Tokens that count, at least 1: those of none have all features 0."""

    @staticmethod
    def empty(conversations: int, features: int, lowest: float = 0.0) -> Pool:
        """Of conversations that no row was added of yet."""
        shape = conversations, features
        return Pool(
            torch.full(shape, lowest, dtype=torch.float32),
            torch.zeros(shape, dtype=torch.float32),
            torch.zeros(shape, dtype=torch.int32),
            torch.zeros(conversations, dtype=torch.int64),
        )

    @property
    def mean_CF(self) -> Tensor:  # noqa: N802
        """Mean over the tokens that count."""
        return self.sum_CF / self.tokens_C.clamp(min=1).unsqueeze(1)

    def by(self, how: str) -> Tensor:
        """float32 [C, F], by `max` or `mean`; what has no tokens is 0."""
        pooled_CF = self.max_CF if how == "max" else self.mean_CF
        return pooled_CF.masked_fill(~pooled_CF.isfinite(), 0.0)

    def add_codes(self, codes: Codes, conversation_R: Tensor) -> None:
        """Rows' codes [R, K]."""
        width = self.max_CF.shape[1]
        values, indices = codes.values.float().cpu().flatten(), codes.indices.cpu()
        flat = (conversation_R.long().unsqueeze(1) * width + indices).flatten()
        self.max_CF.view(-1).scatter_reduce_(0, flat, values, "amax")
        self.sum_CF.view(-1).scatter_add_(0, flat, values)
        self.active_CF.view(-1).scatter_add_(0, flat, (values > 0).int())
        self.tokens_C += torch.bincount(conversation_R.long(), minlength=len(self.tokens_C))

    def add_dense(self, values_RF: Tensor, conversation_R: Tensor) -> None:
        """Rows' features [R, F], whatever their sign; rows of a conversation stand together."""
        names, counts = torch.unique_consecutive(conversation_R.long(), return_counts=True)
        parts = torch.split(values_RF.float().cpu(), counts.tolist())
        for c, part_RF in zip(names.tolist(), parts, strict=True):
            self.max_CF[c] = torch.maximum(self.max_CF[c], part_RF.amax(0))
            self.sum_CF[c] += part_RF.sum(0)
            self.active_CF[c] += (part_RF > 0).sum(0).int()
            self.tokens_C[c] += len(part_RF)


@dataclass(frozen=True)
class Rows:
    """Rows that count, of some conversations."""

    rows: dict[Site, Tensor]
    conversation_R: Tensor
    """int64: position in the whole list of conversations."""
    position_R: Tensor
    """int64: position in the conversation."""
    stop: int
    """Conversations before this one have given all their rows."""


def scoped_rows(
    lm: LanguageModel,
    conversations: Sequence[Conversation],
    sites: Sequence[Site],
    scope: Scope,
    recipe: Recipe,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Rows]:
    """Rows of the tokens that count, some conversations at a time, in order; no conversation is cut.

    No row is left out for its norm or because it repeats an earlier one: what a conversation gives depends on it alone.

    Raises:
        CorpusError: a conversation is longer than a batch.
        TrainingError: more than 1 % of the rows are not finite.
    """
    skip_roles = recipe.activations.skip_roles
    plain = recipe.activations.model_copy(
        update={"skip_first_position": True, "skip_roles": (), "skip_repeated": False, "outlier_factor": None}
    )
    for start, chunk in _chunks(conversations):
        found: Harvest = harvest(lm, chunk, sites, plain, recipe.corpus.batch_tokens)
        masks = [torch.from_numpy(scope.mask(conversation.roles, skip_roles)) for conversation in chunk]
        starts = torch.tensor([0, *(len(mask_T) for mask_T in masks)]).cumsum(0)
        kept_R = torch.cat(masks)[starts[found.conversation_R.long()] + found.position_R.long()]
        on_device = kept_R.nonzero().squeeze(1).to(lm.device)
        yield Rows(
            {site: found.rows[site][on_device] for site in sites},
            found.conversation_R[kept_R].long() + start,
            found.position_R[kept_R].long(),
            start + len(chunk),
        )
        on_progress(start + len(chunk), len(conversations))


def _chunks(conversations: Sequence[Conversation]) -> Iterator[tuple[int, list[Conversation]]]:
    start = tokens = 0
    for end, conversation in enumerate(conversations):
        if tokens and tokens + len(conversation.token_ids) > CHUNK_TOKENS:
            yield start, list(conversations[start:end])
            start, tokens = end, 0
        tokens += len(conversation.token_ids)
    if start < len(conversations):
        yield start, list(conversations[start:])
