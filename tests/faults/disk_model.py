"""A disk that forgets: what stands on it after a cut at any point of a trace of `shim.c`.

Files and folders are inodes. A file has bytes in memory and bytes on disk, a folder has names in memory and names on
disk; only an fsync of the very file or folder carries what is in memory to disk. What a cut leaves lies between what is
on disk for certain (nothing else arrived) and what is in memory (everything arrived, as after a SIGKILL).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias


@dataclass
class File:
    """An inode with bytes."""

    number: int
    inode: str = ""
    memory: bytearray = field(default_factory=bytearray)
    disk: bytes = b""

    def sync(self) -> None:
        """fsync."""
        self.disk = bytes(self.memory)


@dataclass
class Folder:
    """An inode with names."""

    number: int
    inode: str = ""
    memory: dict[str, File | Folder] = field(default_factory=dict)
    disk: dict[str, File | Folder] = field(default_factory=dict)

    def sync(self) -> None:
        """fsync."""
        self.disk = dict(self.memory)


Pick: TypeAlias = Callable[[File | Folder], bool]
Tree: TypeAlias = "dict[str, bytes | Tree]"


@dataclass(frozen=True)
class Call:
    """One line of a trace."""

    what: str
    descriptor: int
    first: str
    second: str
    number: int
    data: bytes


def read_trace(path: Path) -> list[Call]:
    """All calls, in order."""
    data, at, calls = path.read_bytes(), 0, []
    while at < len(data):
        end = data.index(b"\n", at)
        what, descriptor, first, second, number, length = data[at:end].decode().split("\t")
        at = end + 1 + int(length)
        calls.append(Call(what, int(descriptor), first, second, int(number), data[end + 1 : at]))
    return calls


class Disk:
    """The folder `root` and what lies below it; `root` itself is on disk from the beginning."""

    def __init__(self, root: Path) -> None:
        self._root, self.top, self._made = root, Folder(0), 0
        self._open: dict[int, File | Folder] = {}

    def apply(self, call: Call) -> bool:
        """Do what the call did; whether it changed anything, in memory or on disk."""
        if call.what == "open":
            return self._opened(call)
        if call.what == "close":
            self._open.pop(call.descriptor, None)
        if call.what in ("call", "close"):
            return False
        if call.what in ("write", "truncate", "fsync"):
            inode = self._open[call.descriptor]
            if call.what == "fsync":
                inode.sync()
            elif call.what == "write":
                end = call.number + len(call.data)
                inode.memory.extend(bytes(max(0, end - len(inode.memory))))
                inode.memory[call.number : end] = call.data
            else:
                inode.memory.extend(bytes(max(0, call.number - len(inode.memory))))
                del inode.memory[call.number :]
            return True
        folder, name = self._parent(call.first)
        if call.what == "mkdir":
            self._made += 1
            folder.memory[name] = Folder(self._made)
        elif call.what == "rename":
            into, new = self._parent(call.second)
            into.memory[new] = folder.memory.pop(name)
        else:
            del folder.memory[name]
        return True

    def left(self, pick: Pick) -> Tree:
        """What a cut leaves in the root, where `pick` says what each inode has kept."""
        tree = _left(self.top, pick)
        assert isinstance(tree, dict)
        return tree

    def _opened(self, call: Call) -> bool:
        folder, name = self._parent(call.first)
        if not name:
            self._open[call.descriptor] = folder
            return False
        new = name not in folder.memory
        if new:
            self._made += 1
            folder.memory[name] = File(self._made)
        self._follow(folder, name, call.second)
        inode = self._open[call.descriptor] = folder.memory[name]
        if isinstance(inode, File) and call.number & os.O_TRUNC:
            inode.memory.clear()
        return new or bool(call.number & os.O_TRUNC)

    def _follow(self, folder: Folder, name: str, inode: str) -> None:
        """Make good for a rename that the shim has not seen: safetensors asks the kernel for it without libc."""
        there = folder.memory[name]
        there.inode = there.inode or inode
        if there.inode != inode:
            (other,) = (other for other, known in folder.memory.items() if known.inode == inode)
            folder.memory[name] = folder.memory.pop(other)

    def _parent(self, path: str) -> tuple[Folder, str]:
        """The folder that holds the last name; (top, "") for the root."""
        relative = Path(path).relative_to(self._root)
        if not relative.parts:
            return self.top, ""
        folder = self.top
        for part in relative.parts[:-1]:
            inner = folder.memory[part]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, relative.name


def after_each(calls: list[Call], root: Path) -> Iterator[Disk]:
    """The same disk, after each call that changed it."""
    disk = Disk(root)
    for call in calls:
        if disk.apply(call):
            yield disk


def write_tree(tree: Tree, folder: Path) -> None:
    """Make `folder` with what is in `tree`."""
    folder.mkdir()
    for name, inner in tree.items():
        if isinstance(inner, bytes):
            (folder / name).write_bytes(inner)
        else:
            write_tree(inner, folder / name)


def kept_all(inode: File | Folder) -> bool:
    """Everything arrived: a SIGKILL, not a cut."""
    return True


def kept_nothing(inode: File | Folder) -> bool:
    """Only what was fsynced."""
    return False


def kept_names(inode: File | Folder) -> bool:
    """Names arrive before the bytes of their files, as file systems like to have it."""
    return isinstance(inode, Folder)


def kept_some(seed: int) -> Pick:
    """A part of the inodes, drawn at random."""
    return lambda inode: random.Random(seed * 1_000_003 + inode.number).random() < 0.5


def _left(inode: File | Folder, pick: Pick) -> Tree | bytes:
    if isinstance(inode, File):
        return bytes(inode.memory) if pick(inode) else inode.disk
    return {name: _left(inner, pick) for name, inner in (inode.memory if pick(inode) else inode.disk).items()}
