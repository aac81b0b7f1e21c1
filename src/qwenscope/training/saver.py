"""Saving beside training: the step waits for a copy of its tensors, a thread writes the copy to disk."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenscope.files import disk_errors_named
from qwenscope.parallel.group import ALONE, Group
from qwenscope.training import checkpoint

Tensors = dict[str, dict[str, Tensor]]


class Saver:
    """At most one save in flight; the error of a save surfaces at the next `save` or `ended`.

    Args:
        folder: the run's `checkpoints/`.
        keep: how many of the last checkpoints stay beside the snapshots.
        group: ranks that save together, each its own tensors, over connections that no other thread uses.
    """

    def __init__(self, folder: Path, keep: int, group: Group = ALONE) -> None:
        self.folder, self.keep, self.group = folder, keep, group
        self.newest: Path | None = None
        """The last checkpoint that was written, or that the session began from."""
        self._copies: Tensors = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], snapshot: bool
    ) -> None:
        """Copy `tensors` and return; writing goes on behind. `state` must not be changed afterwards."""
        self.ended(wait=True)
        copied = self._copy(tensors)
        self._thread = threading.Thread(
            target=self._write, args=(step, state, copied, snapshot), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether a save in flight is through, well or not: `ended` will not block."""
        return self._thread is None or not self._thread.is_alive()

    def ended(self, wait: bool = False) -> bool:
        """Whether a save has ended well since the last look (`wait`: block until it has); False if none was in flight.

        Raises the error of one that has failed.
        """
        if self._thread is None or not (self.idle or wait):
            return False
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True

    def _write(self, step: int, state: Mapping[str, Any], copied: torch.cuda.Event | None, snapshot: bool) -> None:
        try:
            if copied is not None:
                with torch.cuda.device(copied.device):  # the thread's own matter: it would be the first GPU
                    copied.synchronize()
            self.newest = checkpoint.save(self.folder, step, state, self._copies, snapshot, self.group)
            if self.group.leads:
                with disk_errors_named(self.folder):
                    checkpoint.rotate(self.folder, self.keep)
        except BaseException as error:  # whatever it is, it belongs to the training thread
            self._error = error

    def _copy(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> torch.cuda.Event | None:
        """Copy into buffers that stay for the next save (page faults and pinning are paid once).

        A CUDA tensor goes to pinned memory on the stream that trains: the copy is ordered before the next step's writes
        without a host wait, and the returned event says when the buffers are filled.
        """
        device: torch.device | None = None
        fresh: Tensors = {}
        for stem, group in tensors.items():
            old = self._copies.get(stem, {})
            fresh[stem] = {}
            for name, source in group.items():
                buffer = old.get(name)
                if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                    buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                fresh[stem][name] = buffer.copy_(source, non_blocking=True)
                device = source.device if source.is_cuda else device
        self._copies = fresh
        if device is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event
