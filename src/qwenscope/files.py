"""Files that are either whole or absent: write aside, fsync, rename once; checksums in one place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from qwenscope.errors import FormatError, ResourceError, reason

_CHUNK = 1 << 20
_UMASK_LOCK = Lock()


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new name inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Flush a file that another library wrote, and give it the permissions of any new file (safetensors leaves 0600).

    Raises:
        OSError: `path` is a link, or whatever the disk says.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fchmod(descriptor, 0o666 & ~_umask())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """What the user keeps from others; the only way to read it is to set it for a moment."""
    with _UMASK_LOCK:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def _aside(path: Path) -> Path:
    """A hidden sibling's name that nobody can have foreseen."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")


@contextmanager
def disk_full_named(target: Path, needed: int | None = None) -> Iterator[None]:
    """Turn "no space left" into a ResourceError that names `target` and the bytes needed (if known)."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size = f" ({needed:,} bytes needed)" if needed is not None else ""
        raise ResourceError(f"no space left for {target}{size}; free some disk and run again with --resume") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success fsync it and rename it to `path`, on error remove it.

    Raises:
        ResourceError: the disk is full.
    """
    temporary = _aside(path)
    try:
        with disk_full_named(path):
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
            yield temporary
            fsync_file(temporary)
            os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON (indented, no NaN) in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        FormatError: the file is missing, cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # not text, not JSON, numbers or nesting without measure
        raise FormatError(f"{path} is not JSON ({reason(error)}); restore it or make it again") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({reason(error)})") from None


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder; on success it becomes `folder` in one rename, on error it is removed.

    Raises:
        FormatError: `folder` exists and is not empty.
        ResourceError: the disk is full.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FormatError(f"{folder} exists and is not empty; choose another folder, or remove it")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = _aside(folder.absolute())
    try:
        with disk_full_named(folder):
            temporary.mkdir()
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    fsync_file(path)
                else:
                    fsync_folder(path)
            fsync_folder(temporary)
            os.replace(temporary, folder.absolute())
            fsync_folder(folder.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
