"""One process per run folder, or per file or folder that is to be written: an advisory file lock that the kernel drops
when its holder dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwenscope.errors import CheckpointError, LockError
from qwenscope.files import disk_errors_named, make_folder

LOCK_NAME = ".lock"
_held: set[int] = set()


def _close_in_child() -> None:
    """A forked worker must not keep its parent's lock alive after the parent is killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process until the block ends.

    Raises:
        LockError: another process (or another call in this one) holds it; the message names its pid and host.
        OSError: the lock file cannot be made or is a link, or the file system has no locks.
    """
    descriptor = _acquire(folder / LOCK_NAME, folder)
    try:
        yield
    finally:
        _release(descriptor)


@contextmanager
def sole_writer(out: Path | str | None) -> Iterator[None]:
    """Keep others from writing `out`, a file or a folder, until the block ends; None is written by nobody.

    The lock is a hidden file beside it, which goes when the block ends.

    Raises:
        LockError: another process (or another call in this one) writes it; the message names its pid and host.
        ResourceError: the operating system refuses.
    """
    if out is None:
        yield
        return
    path = Path(out).absolute()
    lock = path.with_name(f".{path.name}{LOCK_NAME}")
    with disk_errors_named(path):
        make_folder(path.parent)
        descriptor = _acquire(lock, Path(out))
    try:
        yield
    finally:
        if descriptor in _held:
            lock.unlink(missing_ok=True)
        _release(descriptor)


def _acquire(path: Path, what: Path) -> int:
    """The descriptor of a lock file for `what`, locked, with our name in it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno != errno.EAGAIN:
                raise
            raise LockError(
                f"{what} is in use by {_holder(path)}; stop that one first, or choose another place"
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor)):
                break
        os.close(descriptor)  # its last holder removed it in the moment before we locked it
    _held.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        os.fsync(descriptor)  # other ranks read it, perhaps from other machines
    except BaseException:
        _release(descriptor)
        raise
    return descriptor


def _release(descriptor: int) -> None:
    if descriptor in _held:  # not in a child that was forked inside the block
        _held.discard(descriptor)
        os.close(descriptor)


def check_held(folder: Path) -> None:
    """Refuse to go on in a folder that is no longer the one that was locked (it was moved, deleted or replaced).

    Raises:
        CheckpointError: this process does not hold what stands under this name now.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        there = os.stat(folder / LOCK_NAME)
        if any(os.path.samestat(there, os.fstat(descriptor)) for descriptor in _held):
            return
    raise CheckpointError(f"{folder} was moved or deleted under way; bring it back and go on by --resume")


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # the holder is between locking and writing its name
        return "another process"
