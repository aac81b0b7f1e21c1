"""One run on several devices: `torchrun --nproc-per-node W -m qwenscope train RECIPE --out RUN`.

Every rank harvests some of the language model's batches, each SAE lives on one rank (one that is too wide, on several),
and rows travel to it: that is two orders of magnitude less than gradients. Windows, batches and steps are those of one
process, so any number of ranks gives the same weights (of an SAE on several of them, but for rounding), and a
checkpoint of one number goes on with another. docs/scaling.md has the figures.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from qwenscope.activations.division import Division
from qwenscope.costs import GPUS, position_seconds, size_of, step_seconds
from qwenscope.errors import RecipeError, ResourceError
from qwenscope.lm.forward import RowSource
from qwenscope.lm.load import LanguageModel
from qwenscope.ranks import ALONE, Group, told
from qwenscope.recipe import Recipe
from qwenscope.training.shards import Piece, Shard, cut, shared

_PATIENCE = timedelta(minutes=30)  # for one collective: ranks load the model and write checkpoints at unlike speed
_PULSE_SECONDS = 0.25


def launched() -> bool:
    """Whether a launcher has started several ranks."""
    return {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether torchrun has started this job anew after a rank was lost: then it resumes without being told."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The ranks that the launcher started, each with a device of its own; without one, this process alone.

    Args:
        device: the recipe's `lm.device`.

    Raises:
        RecipeError: it names certain devices.
        ResourceError: this machine has fewer GPUs than ranks.
        RankLostError: the others are not to be reached.
    """
    if not launched():
        yield ALONE
        return
    if device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"lm.device {device} names what one process uses; for several ranks set it to auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        if local >= torch.cuda.device_count():
            raise ResourceError(
                f"local rank {local} has no GPU of its own, this machine has {torch.cuda.device_count()}; "
                "start fewer ranks (--nproc-per-node)"
            )
        torch.cuda.set_device(local)
    with told():
        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
        # torchrun keeps one store over restarts: under the old keys a rank would call at the addresses of the dead.
        own = PrefixStore(f"qwenscope-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{size}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=_PATIENCE)
    yield Group(rank, size)
    dist.destroy_process_group()  # after an error the process ends anyway, and nobody may answer any more


def owners(recipe: Recipe, ranks: int) -> list[list[Piece]]:
    """The SAEs of each rank, or its latents of them, in the recipe's order.

    Dealt by latents, the largest first, each to the rank that holds the least; memory and checkpoints follow them. Time
    is evened out by `divide`. Further ranks stay empty.
    """
    most = recipe.training.latents_per_rank
    suite = [cut(sae_id, point.dict_size, most, ranks) for sae_id, point in recipe.hook_points.items()]
    held: list[list[Piece]] = [[] for _ in range(ranks)]
    for pieces in sorted(suite, key=lambda pieces: -pieces[0].latents):
        free = sorted(range(ranks), key=lambda rank: sum(piece.latents for piece in held[rank]))[: len(pieces)]
        for rank, piece in zip(sorted(free), pieces, strict=True):  # a group's ranks are in order, so its latents are
            held[rank].append(piece)
    order = list(recipe.hook_points)
    return [sorted(pieces, key=lambda piece: order.index(piece.sae_id)) for pieces in held]


def shards(recipe: Recipe, group: Group) -> dict[str, Shard]:
    """This rank's latents of each SAE that it owns, with the ranks that share it; called by all ranks alike."""
    owned = owners(recipe, group.size)
    groups: dict[tuple[int, ...], Group | None] = {}
    own: dict[str, Shard] = {}
    for sae_id, point in recipe.hook_points.items():
        holders = {rank: piece for rank, held in enumerate(owned) for piece in held if piece.sae_id == sae_id}
        ranks = tuple(holders)
        if ranks not in groups:
            groups[ranks] = group.among(ranks) if len(ranks) > 1 else ALONE
        if (among := groups[ranks]) is not None and group.rank in ranks:
            own[sae_id] = Shard((0, *(piece.stop for piece in holders.values())), point.k, among)
    return own


def divide(recipe: Recipe, lm: RowSource, group: Group) -> Division:
    """Who owns which rows, and how busy each rank is with its SAEs: one with more to do there harvests less.

    Where steps exchange tensors too, GPUs take turns: two threads that use nccl side by side can lock each other out,
    when ranks meet their kernels in unlike order. Engines other than transformers work in one process and one thread.
    """
    if not isinstance(lm, LanguageModel):
        return Division(ALONE, (recipe.layers,), (0.0,), in_turn=True)
    card = GPUS["h200"]  # only the ratio of harvesting to SAE steps matters, and only to who waits for whom
    position = sum(position_seconds(size_of(lm.model, lm.model.config, lm.layer_kinds[: len(lm.layers)]), card))
    steps = recipe.activations.window_tokens / recipe.training.batch_size
    owned, points = owners(recipe, group.size), recipe.hook_points

    def seconds(piece: Piece) -> float:
        return sum(step_seconds(recipe, piece, lm.hidden_dim, card))

    return Division(
        group,
        tuple(tuple(sorted({points[piece.sae_id].layer for piece in held})) for held in owned),
        tuple(steps * sum(map(seconds, held)) / position for held in owned),
        in_turn=lm.device.type == "cuda" and shared(owned),
    )


@dataclass(frozen=True)
class Wishes:
    """What the ranks want done after this step."""

    stop: int | None = None
    """A signal's number."""
    save: bool = False
    saved: bool = False
    """The save in flight has ended on every rank."""


class Pulse:
    """Lets signals, clocks and background saves take effect at the same step on every rank.

    Alone it passes on whatever it is told, at every step. Several ranks agree about four times a second: rank 0 reckons
    how many steps that is, and says so when they agree.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._step: int | None = None
        self._next = 0
        self._time = time.monotonic()

    def beat(self, step: int, wishes: Wishes) -> Wishes:
        """This rank's wishes after `step` -> those of all, or none before the time has come."""
        if self._group.size == 1:
            return wishes
        if step < self._next:
            return Wishes()
        now = time.monotonic()
        taken = 1 if self._step is None else max(1, step - self._step)
        steps = min(4 * taken, max(1, round(taken * _PULSE_SECONDS / max(now - self._time, 1e-9))))
        said = self._group.together(lambda: (wishes.stop, wishes.save, wishes.saved, steps))
        self._step, self._time, self._next = step, now, step + said[0][3]
        return Wishes(
            next((stop for stop, _, _, _ in said if stop is not None), None),
            any(save for _, save, _, _ in said),
            all(saved for _, _, saved, _ in said),
        )
