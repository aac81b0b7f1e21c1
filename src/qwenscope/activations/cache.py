"""Windows kept on disk, so that many runs reuse one harvest: same rows, same order, every byte checked.

Layout, under the folder or fsspec URL of `activations.cache`; the fingerprint covers whatever the rows depend on (the
model and a digest of its weights, its dtype, the hooked layers, corpus, activations, seed), so unlike recipes may share
one cache:

    <fingerprint>/window-000000/layer-06.safetensors ... tokens.safetensors
    <fingerprint>/window-000000/manifest.json        written last: a window without one does not exist

A file whose length or sha256 is not the manifest's is an error that names it, never a silent second harvest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import safetensors.torch
import torch
from torch import Tensor

from qwenscope.activations.harvest import Harvest
from qwenscope.errors import FormatError, ResourceError, reason
from qwenscope.files import atomic_path
from qwenscope.hub import redact
from qwenscope.lm.model import RowSource
from qwenscope.lm.sites import Site, sites_of
from qwenscope.recipe import Recipe

logger = logging.getLogger(__name__)

VERSION = 1
_TOKENS = "tokens.safetensors"


@dataclass(eq=False)
class Window:
    """One window: its rows and what a run needs to count and to go on behind it."""

    harvest: Harvest
    conversation_ids: list[str]
    tokens: int
    """Tokens of its conversations, left out or kept."""
    next_cursor: dict[str, Any]
    """Stream state after its last conversation."""


def cache_bytes(tokens: int, values: int, dtype: torch.dtype) -> int:
    """Bytes that `tokens` rows of so many values take: 36.9 KB per token for nine hook points of 2,048 bf16 values."""
    return tokens * (values * dtype.itemsize + 8)


class WindowCache:
    """Reads and writes windows of one recipe's fingerprint."""

    def __init__(self, root: str, lm: RowSource, recipe: Recipe) -> None:
        """
        Args:
            root: Folder or fsspec URL (s3://..., gs://..., memory://...).
            lm: Whose rows these are.
            recipe: Its lm, corpus, activations, seed and layers make the fingerprint.

        Raises:
            ResourceError: a local disk that cannot hold what is still to be written of the run, or an address that
                cannot be opened.
        """
        self._lm = lm
        self._files = _Files(f"{root.rstrip('/')}/{_fingerprint(lm, recipe)}")
        total = cache_bytes(recipe.training.shuffled_tokens, sum(map(lm.width, sites_of(recipe))), lm.dtype)
        self._files.make_room(total)
        logger.info("activation cache %s: %.1f GB when whole", self._files.name(""), total / 1e9)

    def read(self, index: int, cursor: dict[str, Any], layers: Sequence[Site]) -> Window | None:
        """Window `index` with the rows of `layers`, or None if it is not there.

        Args:
            index: Which window.
            cursor: Stream state before its first conversation, which must be the one it was written with.
            layers: Whose files are read and checked.

        Raises:
            FormatError: a damaged or missing file, or another place in the corpus; names the file.
        """
        folder = f"window-{index:06d}"
        manifest = self._manifest(folder)
        if manifest is None:
            return None
        if manifest["cursor"] != json.loads(json.dumps(cursor)):
            raise FormatError(
                f"{self._files.name(folder)} begins elsewhere in the corpus than this run: corpus.sources changed "
                "since it was written; delete the folder or set activations.cache to another one"
            )
        rows = {layer: self._part(folder, _layer_file(layer), manifest)["rows"].to(self._lm.device) for layer in layers}
        tokens = self._part(folder, _TOKENS, manifest)
        kept = Harvest(
            rows, tokens["conversation"], tokens["position"], manifest["left_out"], manifest["padding_share"]
        )
        return Window(kept, manifest["conversation_ids"], manifest["tokens"], manifest["next_cursor"])

    def write_rows(self, index: int, rows: Mapping[Site, Tensor]) -> dict[str, Any]:
        """Write {site: x_RD} of window `index` -> {file: bytes and sha256} for `finish`.

        Raises:
            ResourceError: the disk is full.
        """
        return {
            _layer_file(layer): self._write_part(index, _layer_file(layer), {"rows": rows_RD})
            for layer, rows_RD in rows.items()
        }

    def finish(self, index: int, window: Window, cursor: dict[str, Any], files: Mapping[str, Any]) -> None:
        """Make window `index` exist: its tokens, and the manifest last.

        Args:
            index: Which window.
            window: Its rows do not matter here.
            cursor: Stream state before its first conversation.
            files: What `write_rows` returned, of all layers together.

        Raises:
            ResourceError: the disk is full, or it is not the one that other ranks wrote their files to.
        """
        for file, entry in files.items():
            if self._files.size(f"window-{index:06d}/{file}") != entry["bytes"]:
                raise ResourceError(
                    f"{self._files.name(f'window-{index:06d}/{file}')} was written by a rank whose files are not seen "
                    "here; set activations.cache to a folder that all machines share"
                )
        kept = window.harvest
        tokens = {"conversation": kept.conversation_R, "position": kept.position_R}
        files = {**files, _TOKENS: self._write_part(index, _TOKENS, tokens)}
        manifest = {
            "version": VERSION,
            "tokens": window.tokens,
            "left_out": kept.left_out,
            "padding_share": kept.padding_share,
            "cursor": cursor,
            "next_cursor": window.next_cursor,
            "conversation_ids": window.conversation_ids,
            "files": dict(sorted(files.items())),
        }
        text = json.dumps({"sha256": _digest(manifest), "manifest": manifest}, indent=1)
        self._files.write(f"window-{index:06d}/manifest.json", text.encode())

    def _write_part(self, index: int, file: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        data = safetensors.torch.save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
        self._files.write(f"window-{index:06d}/{file}", data)
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def _manifest(self, folder: str) -> dict[str, Any] | None:
        data = self._files.read(f"{folder}/manifest.json")
        if data is None:
            return None
        name = self._files.name(f"{folder}/manifest.json")
        try:
            whole = json.loads(data)
            manifest: dict[str, Any] = whole["manifest"]
            sound = whole["sha256"] == _digest(manifest)
        except (UnicodeDecodeError, ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise FormatError(f"{name} is damaged; delete its folder, and the window is harvested again")
        if manifest["version"] != VERSION:
            raise FormatError(f"{name} has format version {manifest['version']}, this program reads {VERSION}")
        return manifest

    def _part(self, folder: str, file: str, manifest: dict[str, Any]) -> dict[str, Tensor]:
        entry = manifest["files"][file]
        data = self._files.read(f"{folder}/{file}")
        if data is None or len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            state = "missing" if data is None else "damaged"
            name = self._files.name(f"{folder}/{file}")
            raise FormatError(f"{name} is {state}; delete its folder, and the window is harvested again")
        return safetensors.torch.load(data)


class _Files:
    """Whole-file reads and atomic writes below one root: a local folder, or any file system that fsspec knows."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._remote: Any = None  # an fsspec file system
        if "://" in root:
            with self._errors_named():
                self._remote, self._base = fsspec.core.url_to_fs(root)
        else:
            self._local = Path(root)

    def name(self, file: str) -> str:
        """`file` for messages: its address without what a user logs in with."""
        return redact(f"{self._root}/{file}".rstrip("/"))

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """One line for whatever a file system that others wrote may raise; a missing file is no such error."""
        try:
            yield
        except (FileNotFoundError, MemoryError):
            raise
        except Exception as error:
            said = redact(reason(error))
            raise ResourceError(f"activations.cache {self.name('')} cannot be used ({said}); see to it") from error

    def make_room(self, total: int) -> None:
        """Refuse a local disk whose free space is below `total` bytes less what is already there."""
        if self._remote is not None:
            return
        self._local.mkdir(parents=True, exist_ok=True)
        present = sum(path.stat().st_size for path in self._local.rglob("*.safetensors"))
        free = shutil.disk_usage(self._local).free
        if total - present > free:
            raise ResourceError(
                f"activations.cache needs {total - present:,} more bytes in {self._local}, {free:,} are free; "
                "free some disk or unset activations.cache"
            )

    def read(self, file: str) -> bytes | None:
        """The file's bytes, or None if there is no such file."""
        try:
            if self._remote is None:
                return (self._local / file).read_bytes()
            with self._errors_named():
                data: bytes = self._remote.cat_file(f"{self._base}/{file}")
        except FileNotFoundError:
            return None
        return data

    def size(self, file: str) -> int | None:
        """The file's length in bytes, or None if there is no such file."""
        try:
            if self._remote is None:
                return (self._local / file).stat().st_size
            with self._errors_named():
                return int(self._remote.size(f"{self._base}/{file}"))
        except FileNotFoundError:
            return None

    def write(self, file: str, data: bytes) -> None:
        if self._remote is not None:
            with self._errors_named():
                self._remote.makedirs(f"{self._base}/{file}".rpartition("/")[0], exist_ok=True)
                self._remote.pipe_file(f"{self._base}/{file}", data)
            return
        path = self._local / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)


def _layer_file(site: Site) -> str:
    return "-".join(filter(None, (f"layer-{site.layer:02d}", site.within))) + ".safetensors"


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _fingerprint(lm: RowSource, recipe: Recipe) -> str:
    parts = {
        "seed": recipe.seed,
        "model": [lm.name, lm.revision, str(lm.dtype), lm.digest(recipe.last_layer)],
        "layers": [int(name.removeprefix("layers.")) if name.count(".") == 1 else name for name in recipe.sites],
        "corpus": recipe.corpus.model_dump(mode="json", exclude={"workers"}),
        "activations": recipe.activations.model_dump(mode="json", exclude={"cache", "overlap"}),
    }
    return _digest(parts)[:16]
