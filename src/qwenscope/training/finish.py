"""The last act of a run: final SAEs, checked as a reader would read them, put in place by one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from qwenscope.checksums import write_checksums
from qwenscope.errors import TrainingError
from qwenscope.files import disk_errors_named, fsync_folder
from qwenscope.parallel.group import ALONE, Group
from qwenscope.sae.sae import SAE

UNPUBLISHED = ".saes.tmp"
"""Name of the folder, beside its target, in which the final SAEs are written; all ranks know it."""
_UNIT_TOLERANCE = 1e-5


def publish(saes: Iterable[tuple[str, SAE | None]], target: Path, needed: int, group: Group = ALONE) -> None:
    """Write every SAE with its `SHA256SUMS` below `target`, which appears whole or not at all.

    Args:
        saes: the same ids on all ranks, in the same order, each SAE on the rank that writes it; one at a time.
        target: the folder.
        needed: bytes of all of them.
        group: all write, or none has.

    Raises:
        ResourceError: the disk is full; names the bytes needed.
            Or the operating system refuses otherwise.
        TrainingError: a weight is not finite, or what was written does not read back to the bit.
    """
    temporary = target.with_name(UNPUBLISHED)

    @disk_errors_named(target, needed)
    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)  # a link that someone has put there
        temporary.mkdir()

    @disk_errors_named(target, needed)
    def write(sae_id: str, sae: SAE | None) -> None:
        if sae is not None:
            sae.save(temporary / sae_id)
            _check(sae_id, sae, temporary / sae_id)
            write_checksums(temporary / sae_id)

    @disk_errors_named(target, needed)
    def put_in_place() -> None:
        fsync_folder(temporary)
        if target.exists():  # of a session that was killed before it could say "complete"
            shutil.rmtree(target)
        os.replace(temporary, target)
        fsync_folder(target.parent)

    try:
        group.broadcast_object(prepare)
        for sae_id, sae in saes:
            group.all_gather_object(partial(write, sae_id, sae))
        group.broadcast_object(put_in_place)
    finally:
        if group.leads:
            shutil.rmtree(temporary, ignore_errors=True)


def _check(sae_id: str, sae: SAE, folder: Path) -> None:
    read = SAE.from_pretrained(folder).state_dict()
    for name, value in sae.state_dict().items():
        if not torch.isfinite(value).all():
            raise TrainingError(f"{sae_id}: {name} is not finite; nothing was published, the checkpoints stand")
        if not torch.equal(read[name], value.cpu()):
            raise TrainingError(f"{folder}: {name} does not read back as written; check the disk")
    norms = read["decoder.weight"].norm(dim=0)
    if (off := (norms - 1).abs().max().item()) > _UNIT_TOLERANCE:
        raise TrainingError(f"{sae_id}: a decoder column's norm is off 1 by {off:.2g}; nothing was published")
