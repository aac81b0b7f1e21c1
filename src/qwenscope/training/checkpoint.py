"""Checkpoints on disk: folders that are either whole and verified, or not there.

    checkpoints/step-00000040/
        manifest.json            format version, and bytes and sha256 of every other file; closed by its own sha256
        state.json               step, tokens, corpus cursor, window, guards, recipe, revisions, versions ...
        <sae_id>.safetensors     weights, moments, counters of one SAE's trainer

A save writes into a hidden folder, fsyncs each file and the folder, and renames once; a kill at any instant leaves
either the old set of checkpoints or the old set and one more. Several ranks write their SAEs' files into one folder,
and rank 0 closes it; any number of them goes on with it. Nothing here knows what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from qwenscope.errors import CheckpointError, ResourceError
from qwenscope.files import disk_errors_named, fsync_folder
from qwenscope.parallel.group import ALONE, Group

logger = logging.getLogger(__name__)

T = TypeVar("T")
FORMAT_VERSION = 1
_MANIFEST, _STATE = "manifest.json", "state.json"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]*")
_PIECE = 1 << 22  # bytes per write: small enough that the training thread gets the interpreter back in between
_SLACK = 1 << 16  # JSON files and file system overhead, in bytes
_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class NewerFormatError(CheckpointError):
    """A checkpoint that a later qwenscope wrote: intact, but not for this version to read."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: JSON state, and tensors (CPU) by file and name."""

    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def checkpoint_bytes(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes that a checkpoint of these tensors needs on disk, JSON and headers included (an upper bound)."""
    return sum(t.numel() * t.element_size() + 256 for group in tensors.values() for t in group.values()) + _SLACK


def save(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    snapshot: bool = False,
    group: Group = ALONE,
) -> Path:
    """Write one checkpoint below `folder` and return its path; the path exists only once everything is on disk.

    Args:
        state: JSON-able, no NaN; rank 0's is written.
        tensors: {file stem: {name: CPU tensor}}, this rank's.
        snapshot: marks a checkpoint that `rotate` keeps forever.
        group: all write, or none has.

    Raises:
        ResourceError: not enough disk (names the bytes needed), or the operating system refuses otherwise. The
            temporary folder is removed.
        RankLostError: a rank is gone; what was written stays hidden, and goes with the next save.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    needed = sum(group.all_gather_object(lambda: checkpoint_bytes(tensors)))

    def prepare() -> None:
        folder.mkdir(exist_ok=True)  # never its parents: a run folder that was deleted under way stays so
        fsync_folder(folder.parent)
        _remove(temporary)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise ResourceError(
                f"no space left for {final}: {needed:,} bytes needed, {free:,} free; free some disk and run again"
            )
        temporary.mkdir()

    def close(parts: list[dict[str, dict[str, Any]]]) -> None:
        _close(temporary, state, {name: entry for part in parts for name, entry in part.items()}, snapshot)
        _remove(final)  # only a damaged one can stand here: resuming loads the newest that verifies
        os.replace(temporary, final)
        fsync_folder(folder)

    def named(act: Callable[[], T]) -> T:
        with disk_errors_named(final, needed):
            return act()

    try:
        group.broadcast_object(lambda: named(prepare))
        parts = group.all_gather_object(lambda: named(lambda: _write_parts(temporary, tensors)))
        group.broadcast_object(lambda: named(lambda: close(parts)))
    finally:
        if group.leads:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def load(path: Path, wanted: Callable[[str], bool] = lambda stem: True) -> Checkpoint:
    """Read a checkpoint, each file once, and verify every byte of it on the way; of tensors, those `wanted` by stem.

    Raises:
        NewerFormatError: a later version wrote it.
        CheckpointError: a file is missing, cut off or changed; the message names it.
    """
    manifest = _read_manifest(path / _MANIFEST)
    if manifest["format_version"] > FORMAT_VERSION:
        raise NewerFormatError(
            f"{path} has checkpoint format {manifest['format_version']}, this qwenscope reads up to {FORMAT_VERSION}; "
            "upgrade qwenscope"
        )
    state: dict[str, Any] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, expected in manifest["files"].items():
        stem = name.removesuffix(".safetensors")
        if name == _STATE:
            state = json.loads(_read_verified(path / name, expected))
        elif wanted(stem):
            tensors[stem] = _parse_tensors(path / name, _read_verified(path / name, expected))
    return Checkpoint(path, state, tensors)


def load_newest(
    folder: Path, wanted: Callable[[str], bool] = lambda stem: True, group: Group = ALONE
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was passed over; (None, []) if there is none at all.

    Args:
        wanted: whether this rank reads the file of that stem.
        group: what one rank finds damaged, all pass over.

    Raises:
        NewerFormatError: the newest intact one needs a later version (an older one is not taken in its place).
        CheckpointError: there are checkpoints, and none of them verifies: starting over is the user's decision.
    """
    passed_over: list[str] = []
    for name in reversed(group.broadcast_object(lambda: [path.name for path in list_checkpoints(folder)])):
        loaded: list[Checkpoint] = []
        try:
            group.all_gather_object(partial(_load_into, loaded, folder / name, wanted))
            return loaded[0], passed_over
        except NewerFormatError:
            raise
        except CheckpointError as error:
            passed_over.append(str(error))
    if passed_over:
        raise CheckpointError(
            f"none of the {len(passed_over)} checkpoints in {folder} verifies ({'; '.join(passed_over)}); "
            "restore one from a copy, or start over in a new --out"
        )
    return None, []


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints below `folder`, oldest first (temporary and damaged ones have other names)."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def set_aside_newer(folder: Path, good: Path) -> None:
    """Rename the checkpoints after `good`, all passed over, so that neither rotation nor a later resume counts them."""
    everything = list_checkpoints(folder)
    for path in everything[everything.index(good) + 1 :]:
        target = path.with_name(f"damaged-{path.name}")
        _remove(target)
        os.replace(path, target)
        logger.warning("kept the damaged checkpoint as %s; delete it once you have looked at it", target)


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints and the snapshots; leftovers of killed saves go too."""
    remove_unfinished(folder)
    for path in list_checkpoints(folder)[:-keep]:
        try:
            if _read_manifest(path / _MANIFEST)["snapshot"]:
                continue
        except CheckpointError as error:  # whoever made it unreadable may want to look at it
            logger.warning("rotation leaves %s alone: %s", path, error)
            continue
        doomed = path.with_name(f".{path.name}.old")  # a half-removed folder must not look like a checkpoint
        os.replace(path, doomed)
        fsync_folder(folder)  # or a cut could bring back the name without the files
        _remove(doomed)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left of saves and removals; the caller holds the run's lock."""
    for path in folder.glob(".step-*"):
        _remove(path)


def _load_into(loaded: list[Checkpoint], path: Path, wanted: Callable[[str], bool]) -> None:
    loaded.append(load(path, wanted))


def _write_parts(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """One file per stem -> {file: its entry in the manifest}."""
    files: dict[str, dict[str, Any]] = {}
    for stem, group in tensors.items():
        if not _SAFE_NAME.fullmatch(stem):
            raise CheckpointError(f"{stem!r} cannot name a file; use letters, digits, _ . @ -")
        files[f"{stem}.safetensors"] = _write_tensors(folder / f"{stem}.safetensors", group)
    return files


def _close(folder: Path, state: Mapping[str, Any], files: dict[str, dict[str, Any]], snapshot: bool) -> None:
    """State and manifest, after all else is on disk."""
    text = json.dumps(dict(state), indent=1, ensure_ascii=False, allow_nan=False)
    files[_STATE] = _write_pieces(folder / _STATE, [memoryview(text.encode())])
    manifest = _manifest_bytes({"format_version": FORMAT_VERSION, "snapshot": snapshot, "files": files})
    _write_pieces(folder / _MANIFEST, [memoryview(manifest)])
    fsync_folder(folder)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file and hash it on the way.

    The library's own writer holds the interpreter lock for the whole file and leaves no hash; the format is a length, a
    JSON header and the raw bytes (widest dtype first, so that every tensor is aligned).
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pieces: list[memoryview] = [memoryview(len(text).to_bytes(8, "little") + text)]
    pieces += [tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data for name in order]
    return _write_pieces(path, pieces)


def _write_pieces(path: Path, pieces: list[memoryview]) -> dict[str, Any]:
    """Write, fsync, and return {"bytes", "sha256"}; writing and hashing release the interpreter lock piece by piece."""
    digest, written = hashlib.sha256(), 0
    with path.open("xb") as file:
        for data in pieces:
            for start in range(0, len(data), _PIECE):
                piece = data[start : start + _PIECE]
                file.write(piece)
                digest.update(piece)
                written += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": written, "sha256": digest.hexdigest()}


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest: whatever else stands in the file has been changed."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged (not JSON)") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format_version"), int):
        raise CheckpointError(f"{path} is damaged (not a manifest)")
    if _manifest_bytes(manifest) != data:
        raise CheckpointError(f"{path} is damaged (sha256 differs)")
    if manifest["format_version"] <= FORMAT_VERSION and not _lists_files(manifest):
        raise CheckpointError(f"{path} is damaged (not a manifest)")
    return manifest


def _lists_files(manifest: Mapping[str, Any]) -> bool:
    files = manifest.get("files")
    return (
        isinstance(manifest.get("snapshot"), bool)
        and isinstance(files, dict)
        and _STATE in files
        and all(
            _SAFE_NAME.fullmatch(name) and isinstance(entry, dict) and entry.keys() >= {"bytes", "sha256"}
            for name, entry in files.items()
        )
    )


def _read_verified(path: Path, expected: Mapping[str, Any]) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    if len(data) != expected["bytes"]:
        raise CheckpointError(f"{path} is damaged ({len(data):,} bytes instead of {expected['bytes']:,})")
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{path} is damaged (sha256 differs)")
    return data


def _parse_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file ({error})") from None


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
