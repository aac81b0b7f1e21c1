"""One run on several devices: `torchrun --nproc-per-node W -m qwenscope train RECIPE --out RUN`.

Every rank harvests some of the language model's batches, each SAE lives on one rank (one that is too wide, on several),
and rows travel to it: that is two orders of magnitude less than gradients. Windows, batches and steps are those of one
process, so any number of ranks gives the same weights (of an SAE on several of them, but for rounding), and a
checkpoint of one number goes on with another. docs/scaling.md has the figures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from qwenscope.errors import RecipeError, ResourceError
from qwenscope.parallel.group import ALONE, Group, loss_in_one_line

_PATIENCE = timedelta(minutes=30)  # for one collective: ranks load the model and write checkpoints at unlike speed


def launched() -> bool:
    """Whether a launcher has started several ranks."""
    return ranks() > 1


def ranks() -> int:
    """How many a launcher has started; 1 without one."""
    by_launcher = {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return int(os.environ.get("WORLD_SIZE", "1")) if by_launcher else 1


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
    with loss_in_one_line():
        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
        # torchrun keeps one store over restarts: under the old keys a rank would call at the addresses of the dead.
        own = PrefixStore(f"qwenscope-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{size}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=_PATIENCE)
    yield Group(rank, size)
    dist.destroy_process_group()  # after an error the process ends anyway, and nobody may answer any more
