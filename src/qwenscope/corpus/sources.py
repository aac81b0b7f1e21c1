"""Where rows come from: local files, Hub datasets, or the built-in generator.

A source hands out rows in chunks from any (shard, row) on, so that a cursor of two numbers resumes it exactly. Its
revision pins the content: the Hub's commit, a digest of local files, or the generator's own version.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from qwenscope.corpus.shards import CHUNK_ROWS, SUFFIXES, Shard, read_shard
from qwenscope.errors import CorpusError
from qwenscope.files import sha256
from qwenscope.recipe import SourceRecipe
from qwenscope.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one shard in reading order, as (index, row)."""

    shard: int
    rows: list[tuple[int, Any]]


class Source(Protocol):
    """What the stream needs of a source."""

    id: str
    revision: str
    schema: str
    """What a row is: `messages`, `wildchat`, or `generated` (a number)."""
    own_split: bool
    """Held-out conversations come from shards or numbers of their own, not by hash."""
    finite: bool

    def chunks(self, shard: int, row: int) -> Iterator[Chunk]:
        """Rows from index `row` of shard number `shard` on, to the end."""


@dataclass(frozen=True)
class FileSource:
    """Shards in a shuffled order, local or on the Hub."""

    id: str
    revision: str
    schema: str
    own_split: bool
    where: str
    shards: tuple[Shard, ...]
    seed: int
    finite: bool = True

    def chunks(self, shard: int, row: int) -> Iterator[Chunk]:
        for number in range(shard, len(self.shards)):
            part = self.shards[number]
            seed = derive_seed(self.seed, "row groups", part.name)
            for rows in read_shard(part, row if number == shard else 0, self.schema, seed, self.where):
                yield Chunk(number, rows)


@dataclass(frozen=True)
class GeneratedSource:
    """The built-in tool-use generator: row i is the number i."""

    id: str
    count: int | None
    revision: str = "built-in"
    schema: str = "generated"
    own_split: bool = True

    @property
    def finite(self) -> bool:
        return self.count is not None

    def chunks(self, shard: int, row: int) -> Iterator[Chunk]:
        while self.count is None or row < self.count:
            stop = row + CHUNK_ROWS if self.count is None else min(row + CHUNK_ROWS, self.count)
            yield Chunk(shard, [(index, index) for index in range(row, stop)])
            row = stop


def source_ids(sources: Sequence[SourceRecipe]) -> list[str]:
    """Each source's name, with #2, #3 ... where a name stands again.

    >>> source_ids([])
    []
    """
    seen: dict[str, int] = {}
    ids = []
    for source in sources:
        seen[source.name] = seen.get(source.name, 0) + 1
        ids.append(source.name if seen[source.name] == 1 else f"{source.name}#{seen[source.name]}")
    return ids


def open_source(recipe: SourceRecipe, id: str, seed: int, held_out: bool, pinned: str | None) -> Source:
    """Resolve a source to its shards.

    Args:
        recipe: the source as the recipe has it.
        id: its id in reports.
        seed: governs the order of shards and row groups.
        held_out: read the held-out split where the source has its own.
        pinned: the revision of an earlier run; None resolves it now.

    Raises:
        CorpusError: missing, empty, or no longer the pinned revision; names the source.
    """
    if recipe.path is not None:
        return _local_source(recipe, id, seed, held_out, pinned)
    return GeneratedSource(id, None)


def shuffled(shards: Sequence[Shard], seed: int) -> tuple[Shard, ...]:
    """Shards in an order that depends on their names and the seed only."""
    ordered = sorted(shards, key=lambda shard: shard.name)
    random.Random(derive_seed(seed, "shards")).shuffle(ordered)
    return tuple(ordered)


def choose_split(name: str, files: Sequence[str], held_out: bool) -> tuple[list[str], bool]:
    """The files of the wanted split, and whether it is a split of the dataset's own."""
    if name == "ultrachat" and any("test_sft" in file for file in files):
        wanted = "test_sft" if held_out else "train_sft"
        return [file for file in files if wanted in file], True
    return list(files), False


def _local_source(recipe: SourceRecipe, id: str, seed: int, held_out: bool, pinned: str | None) -> FileSource:
    assert recipe.path is not None
    root = recipe.path
    where = f"corpus source {id} ({root})"
    if root.is_file():
        root, names = root.parent, [root.name]
    elif root.is_dir():
        paths = (path for path in root.rglob("*") if path.is_file())
        names = sorted(path.relative_to(root).as_posix() for path in paths)
        names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    else:
        raise CorpusError(f"{where}: no such file or folder; correct corpus.sources[].path")
    names = [name for name in names if name.endswith(SUFFIXES)]
    if not names:
        raise CorpusError(f"{where} holds no {', '.join(SUFFIXES)} file")
    chosen, own_split = choose_split(recipe.name, names, held_out)
    digests = {name: sha256(root / name) for name in names}
    text = "\n".join(f"{name} {digest}" for name, digest in digests.items())
    revision = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    if pinned is not None and pinned != revision:
        raise CorpusError(f"{where}: the files are not those the run began with; restore them or start a new run")
    shards = [Shard(name, partial(_open_local, root / name)) for name in chosen]
    schema = "wildchat" if recipe.name == "wildchat" else "messages"
    return FileSource(id, revision, schema, own_split, where, shuffled(shards, seed), seed)


def _open_local(path: Path) -> IO[bytes]:
    return path.open("rb")
