"""`SHA256SUMS`: the digests of a folder's files, in the format of `sha256sum --check`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from qwenscope.errors import FormatError
from qwenscope.files import below, sha256, write_text

CHECKSUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_checksums(root: Path, only: Iterable[str] | None = None) -> None:
    """List every file below `root` (or those of `only` that are there) with its digest in `root/SHA256SUMS`."""
    paths = below(root) if only is None else (root / name for name in only)
    names = sorted(path.relative_to(root).as_posix() for path in paths if path.is_file())
    lines = [f"{sha256(root / name)}  {name}\n" for name in names if name != CHECKSUMS_FILE]
    write_text(root / CHECKSUMS_FILE, "".join(lines))


def read_checksums(root: Path) -> dict[str, str] | None:
    """Digest by relative path, or None where the folder has no `SHA256SUMS`.

    Raises:
        FormatError: a line is not `<64 hex digits>  <path>`.
    """
    path = root / CHECKSUMS_FILE
    if not path.is_file():
        return None
    digests: dict[str, str] = {}
    # Only "\n" ends a line, the last one too: splitlines would let a flipped bit in a line's end pass.
    *lines, cut_off = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    if cut_off:
        lines.append("")
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if not match:
            raise FormatError(f"{path}: line {number} is not '<sha256>  <path>'; restore the file or download it again")
        digests[match[2]] = match[1]
    return digests


def verify_listed(root: Path, files: Iterable[Path]) -> None:
    """Compare `files` below `root` with its `SHA256SUMS`; nothing to do where there is none.

    Raises:
        FormatError: a file is not listed, or its bytes differ from what is listed.
    """
    digests = read_checksums(root)
    if digests is None:
        return
    for path in files:
        name = path.relative_to(root).as_posix()
        if name not in digests:
            raise FormatError(
                f"{path} is not listed in {root / CHECKSUMS_FILE}; restore the folder or download it again"
            )
        if sha256(path) != digests[name]:
            raise FormatError(f"{path} is damaged: its sha256 differs from {CHECKSUMS_FILE}; download it again")


def verify_folder(root: Path) -> None:
    """Verify every file that `root/SHA256SUMS` lists.

    Raises:
        FormatError: there is no list, a listed file is missing or lies outside, or its bytes differ.
    """
    digests = read_checksums(root)
    if digests is None:
        raise FormatError(f"{root / CHECKSUMS_FILE} is missing; {root} is no whole release")
    for name in digests:
        try:
            inside = (root / name).resolve().is_relative_to(root.resolve()) and (root / name).is_file()
        except (OSError, ValueError, RuntimeError):  # no name that a file can have, or links in a circle
            inside = False
        if not inside:
            raise FormatError(f"{root / name} is listed in {CHECKSUMS_FILE} and missing; pull the release again")
    verify_listed(root, [root / name for name in digests])
