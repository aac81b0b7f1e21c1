"""Files that are either whole or absent: write aside, fsync, rename once; checksums in one place.

Whatever is written aside has a hidden name of one pattern and is locked by its writer: `remove_leftovers` tells by the
lock, which the kernel drops, what a killed process has left.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors import SafetensorError, safe_open

from qwenscope.errors import FormatError, ResourceError, reason

_CHUNK = 1 << 20
_UMASK_LOCK = Lock()
_ASIDE = re.compile(r"\.(.+)\.\d+-[0-9a-f]{16}\.tmp")
_SQLITE_REFUSALS = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


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


def public_name(model: str) -> str:
    """A model's name fit for publication: Hub ids as they are, folders and files by their last part."""
    path = Path(model)
    on_hub = model.count("/") < 2 and not model.startswith((".", "~", "/"))
    return model if on_hub and not path.exists() else path.name


def make_folder(folder: Path) -> None:
    """Make `folder` and its missing parents, so that their names survive a power cut."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new or [folder]:
        with suppress(PermissionError):  # a parent that may be entered and not read
            fsync_folder(path.absolute().parent)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of `atomic_path` and `whole_folder` in `folder` (of the target `name` alone).

    What a living process writes stays: it holds a lock. So does what cannot be opened or removed.
    """
    with suppress(OSError):
        for path in list(folder.iterdir()):
            match = _ASIDE.fullmatch(path.name)
            if match and name in (None, match[1]):
                with suppress(OSError):
                    _remove_unless_locked(path)


def _remove_unless_locked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(descriptor)


@contextmanager
def _aside(path: Path, make: Callable[[Path], int]) -> Iterator[Path]:
    """A hidden sibling of `path` that nobody can have foreseen, made, opened and locked; gone in the end."""
    remove_leftovers(path.parent, path.name)
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")
        descriptor = make(temporary)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():
            break
        os.close(descriptor)  # taken for a leftover in the moment before it was locked
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink()
        os.close(descriptor)


def _make_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)


def _make_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def refused(error: Exception, target: Path | None = None, needed: int | None = None) -> ResourceError | None:
    """What the operating system refused, as one line that names `target` and the bytes needed (if known).

    Libraries that write by themselves are asked too. None where `error` is of another kind.
    """
    number, where = None, None
    if isinstance(error, OSError):
        number, where = error.errno, error.filename
    elif isinstance(error, SafetensorError) and (match := re.search(r"os error (\d+)", str(error))):
        number = int(match[1])
    elif isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF in _SQLITE_REFUSALS:
        number = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
    if number is None:
        return None
    file = os.fsdecode(where) if isinstance(where, str | bytes) else None
    named = str(target or file or "a file")
    if number in (errno.ENOSPC, errno.EDQUOT):
        size = f" ({needed:,} bytes needed)" if needed is not None else ""
        return ResourceError(f"no space left for {named}{size}; free some disk and run again")
    at = f" at {file}" if file not in (None, named) else ""
    return ResourceError(f"{named}: {os.strerror(number)}{at}; see to disk, permissions and limits, and run again")


def below(folder: Path) -> Iterator[Path]:
    """All files and folders below `folder`, in no order; links to folders are named, not followed.

    Raises:
        OSError: a folder may not be read, where `Path.rglob` would pass over it as if it were empty.
    """

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=refuse):
        for name in (*folders, *names):
            yield Path(place, name)


@contextmanager
def disk_errors_named(target: Path, needed: int | None = None) -> Iterator[None]:
    """Turn whatever the operating system refuses while `target` is written into a ResourceError (see `refused`)."""
    try:
        yield
    except (OSError, SafetensorError, sqlite3.OperationalError) as error:
        if (known := refused(error, target, needed)) is None:
            raise
        raise known from error


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file, whose tensors are read when they are asked for.

    Raises:
        OSError: it cannot be opened or mapped (torch, which maps it, raises RuntimeError with the number in its text).
        SafetensorError: it is none, or not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except RuntimeError as error:
        if (match := re.match(r"unable to (?:open|mmap|stat) .*\((\d+)\)$", str(error))) is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success fsync it and rename it to `path`, on error remove it.

    Raises:
        ResourceError: the disk is full, or the operating system refuses otherwise.
    """
    with disk_errors_named(path), _aside(path, _make_file) as temporary:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON (indented, no NaN) in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_at_most(path: Path, most: int) -> bytes:
    """A file's bytes, of which there are so many at most: devices have no end.

    Raises:
        ValueError: there are more.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it holds more than {most:,} bytes")
    return data


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


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object.

    Raises:
        FormatError: as `read_json`, or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise FormatError(f"{path} is no JSON object; restore it or make it again")
    return value


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside `path`; what is left of it when the block ends goes.

    Raises:
        ResourceError: the disk is full, or the operating system refuses otherwise.
    """
    path = path.absolute()
    with disk_errors_named(path):
        make_folder(path.parent)
        with _aside(path, _make_folder) as temporary:
            yield temporary


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder; on success it becomes `folder` in one rename, on error it is removed.

    Raises:
        FormatError: `folder` exists and is not empty, at the start or by the end.
        ResourceError: the disk is full, or the operating system refuses otherwise.
    """
    check_empty(folder)
    with folder_aside(folder) as temporary:
        yield temporary
        for path in below(temporary):
            if path.is_file():
                fsync_file(path)
            else:
                fsync_folder(path)
        fsync_folder(temporary)
        check_empty(folder)
        os.replace(temporary, folder.absolute())
        fsync_folder(folder.absolute().parent)


def check_empty(folder: Path) -> None:
    """FormatError if `folder` is there and holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FormatError(f"{folder} exists and is not empty; choose another folder, or remove it")
