"""The processes of one run, and what they tell each other. One process alone is a group too, at no cost.

The methods are torch.distributed's, by its names, and called by all ranks in the same order as there. Two things
differ: objects travel as JSON, so that nothing is ever unpickled, and are made by a function, so that its error travels
in their place. `launch.py` starts a group.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qwenscope.errors import QwenscopeError, TrainingError

T = TypeVar("T")


class RankLostError(TrainingError):
    """Another process of the run has ended, or failed in a way that is no user's error."""

    exit_code = 12


class Group:
    """The ranks of one run.

    Args:
        rank: this process's number; rank 0 leads: it reads the corpus and owns the run folder.
        size: how many there are.
        process_group: None is torch.distributed's default one.
    """

    def __init__(self, rank: int = 0, size: int = 1, process_group: Any = None) -> None:
        self.rank, self.size = rank, size
        self._group = process_group

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def clone(self, rows: bool = False) -> Group:
        """The same ranks over connections of their own, for another thread; with `rows` also for tensors on GPUs."""
        if self.size == 1:
            return self
        with loss_in_one_line():
            return Group(self.rank, self.size, dist.new_group(backend=None if rows else "gloo"))

    def new_group(self, ranks: Sequence[int]) -> Group | None:
        """Those `ranks` as a group of their own, in that order; None where this is none of them."""
        with loss_in_one_line():
            process_group = dist.new_group(list(ranks))
        return Group(ranks.index(self.rank), len(ranks), process_group) if self.rank in ranks else None

    def all_gather_object(self, act: Callable[[], T]) -> list[T]:
        """Let every rank `act` -> the results (JSON-able) of all, by rank.

        Raises:
            QwenscopeError: `act` raised on some rank: its own error where it did, the same class and message elsewhere.
            RankLostError: it raised what is no QwenscopeError on another rank; or a rank is gone.
        """
        if self.size == 1:
            return [act()]
        encoded, error = _encoded(act)
        data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        lengths = self.all_gather(torch.tensor([len(data)]))
        rows = self.all_gather(torch.cat([data, data.new_zeros(int(max(lengths)) - len(data))]))
        if error is not None:
            raise error
        whole = [row[: int(length)].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]
        return [_result(rank, outcome) for rank, outcome in enumerate(whole)]

    def broadcast_object(self, act: Callable[[], T]) -> T:
        """Let rank 0 `act` -> its result (JSON-able) on every rank.

        Raises:
            QwenscopeError, RankLostError: as `all_gather_object`.
        """
        if self.size == 1:
            return act()
        encoded, error = _encoded(act) if self.leads else (b"", None)
        length = torch.tensor([len(encoded)])
        self.broadcast_(length)
        data = (
            torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
            if self.leads
            else torch.empty(int(length), dtype=torch.uint8)
        )
        self.broadcast_(data)
        if error is not None:
            raise error
        result: T = _result(0, data.numpy().tobytes())
        return result

    def broadcast_(self, tensor: Tensor) -> None:
        """Overwrite `tensor` by rank 0's, which has the same shape and dtype."""
        if self.size > 1:
            with loss_in_one_line():
                dist.broadcast(tensor, group_src=0, group=self._group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' `tensor` (same shape and dtype), the same bits on each; in place."""
        if self.size > 1:
            with loss_in_one_line():
                dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """All ranks' `tensor` (same shape and dtype), by rank."""
        if self.size == 1:
            return [tensor]
        raw = tensor.contiguous().view(-1).view(torch.uint8)  # any dtype, to the bit
        arrived = [torch.empty_like(raw) for _ in range(self.size)]
        with loss_in_one_line():
            dist.all_gather(arrived, raw, group=self._group)
        return [other.view(tensor.dtype).view(tensor.shape) for other in arrived]

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Rows [S, X] to their ranks -> what arrives here, [R, X].

        Args:
            rows: send[0] rows for rank 0, then send[1] for rank 1, and so on.
            send: rows for each rank; S is their sum.
            receive: rows from each rank, in whose order they arrive; R is their sum.
        """
        if self.size == 1:
            return rows
        if rows.is_cuda:  # nccl would wait half an hour for a rank that died on its way here; this notices at once
            self.all_gather_object(lambda: None)
        raw = rows.contiguous().view(torch.uint8)  # any dtype, to the bit
        arrived = raw.new_empty(sum(receive), raw.shape[1])
        with loss_in_one_line():
            dist.all_to_all_single(arrived, raw, list(receive), list(send), self._group)
        return arrived.view(rows.dtype)


ALONE = Group()
"""One process, no launcher."""


@contextmanager
def loss_in_one_line() -> Iterator[None]:
    """gloo's and nccl's errors in one line, as RankLostError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].split(" This is typically")[0]
        raise RankLostError(
            f"lost contact with another rank ({reason}); its own last line says why; "
            "the last checkpoint stands, --resume goes on from it"
        ) from error


def _encoded(act: Callable[[], Any]) -> tuple[bytes, Exception | None]:
    """The value or the error as JSON for the others, and what to raise once they have it."""
    try:
        return json.dumps({"value": act()}).encode(), None
    except Exception as error:  # of any kind: the others must not wait for this rank in vain
        return json.dumps({"error": [type(error).__name__, str(error)]}).encode(), error


def _result(rank: int, encoded: bytes) -> Any:
    """The value that this rank's act gave; its error is raised here too."""
    outcome = json.loads(encoded)
    if "error" not in outcome:
        return outcome["value"]
    name, message = outcome["error"]
    for known in _family(QwenscopeError):
        if known.__name__ == name:
            raise known(f"rank {rank}: {message}")
    raise RankLostError(f"rank {rank} failed: {name}: {message}")


def _family(cls: type[QwenscopeError]) -> Iterator[type[QwenscopeError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _family(child)
