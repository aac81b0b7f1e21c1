"""Where rows come from: local files, Hub datasets, or the built-in generator.

A source hands out rows in chunks from any (shard, row) on, so that a cursor of two numbers resumes it exactly. Its
revision pins the content: the Hub's commit, a digest of local files, or the generator's own version.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any, Protocol

from qwenscope.corpus.hub import REPOSITORIES, hub_shards
from qwenscope.corpus.mixing import MIXED_SHARDS, read_mixed
from qwenscope.corpus.repair import conversation_id
from qwenscope.corpus.shards import CHUNK_ROWS, SUFFIXES, Columns, Shard
from qwenscope.corpus.tool_use import GENERATORS
from qwenscope.errors import CorpusError
from qwenscope.files import below, sha256
from qwenscope.recipe import SourceRecipe
from qwenscope.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows in reading order, as (index, row); `shard` counts what is read as one piece."""

    shard: int
    rows: list[tuple[int, Any]]


class Source(Protocol):
    """What the stream needs of a source."""

    @property
    def id(self) -> str:
        """In reports and states."""

    @property
    def revision(self) -> str:
        """What pins the content."""

    @property
    def schema(self) -> str:
        """What a row is: `rows` (messages or text), `wildchat`, or the name of a generator (a row is a number)."""

    @property
    def own_split(self) -> bool:
        """Held-out conversations come from shards or numbers of their own, not by hash."""

    @property
    def where(self) -> str:
        """Its id and place, for messages."""

    @property
    def finite(self) -> bool:
        """It ends by itself."""

    def chunks(self, shard: int, row: int) -> Iterator[Chunk]:
        """Rows from index `row` of shard number `shard` on, to the end."""


@dataclass(frozen=True)
class FileSource:
    """Files in a shuffled order, local or on the Hub; the files of a group are mixed row by row."""

    id: str
    revision: str
    schema: str
    columns: Columns
    own_split: bool
    where: str
    groups: tuple[tuple[Shard, ...], ...]
    seed: int
    finite: bool = True

    def chunks(self, shard: int, row: int) -> Iterator[Chunk]:
        """Rows of the groups from `row` of group number `shard` on, a chunk never of two groups."""
        for number in range(shard, len(self.groups)):
            start = row if number == shard else 0
            for rows in read_mixed(self.groups[number], start, self.columns, self.seed, self.where):
                yield Chunk(number, rows)


@dataclass(frozen=True)
class GeneratedSource:
    """The built-in generator, endless: row i is the number i."""

    id: str
    revision: str
    schema: str
    where: str
    own_split: bool = True
    finite: bool = False

    def chunks(self, shard: int, row: int) -> Iterator[Chunk]:
        """The numbers from `row` on, without end."""
        for start in count(row, CHUNK_ROWS):
            yield Chunk(shard, [(index, index) for index in range(start, start + CHUNK_ROWS)])


def source_ids(sources: Sequence[SourceRecipe]) -> list[str]:
    """Each source's name, with #2, #3 ... where a name stands again.

    Examples:
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
        where = f"corpus source {id} ({recipe.path})"
        revision, shards = _local_shards(recipe.path, where)
    elif recipe.generated:
        where = f"corpus source {id} (the built-in generator)"
        revision, shards = _generator_revision(recipe.name), []
    else:
        repo = recipe.repo or REPOSITORIES[recipe.name]
        where = f"corpus source {id} ({' '.join(filter(None, (repo, recipe.config)))})"
        by_card = recipe.name == "files" or recipe.config is not None
        revision, shards = hub_shards(repo, pinned or recipe.revision, where, by_card, recipe.config)
    if pinned is not None and pinned != revision:
        raise CorpusError(f"{where} is not what the run began with; restore it, or start a new run")
    if not shards:
        return GeneratedSource(id, revision, recipe.name, where)
    chosen, own_split = choose_split(recipe.name, shards, held_out)
    schema, columns = ("wildchat", None) if recipe.name == "wildchat" else ("rows", _columns(recipe))
    together = 1 if recipe.path is None else MIXED_SHARDS  # shards of one Hub dataset are alike, and each is a stream
    ordered = shuffled(chosen, seed)
    groups = tuple(ordered[start : start + together] for start in range(0, len(ordered), together))
    return FileSource(id, revision, schema, columns, own_split, where, groups, seed)


def _columns(recipe: SourceRecipe) -> dict[str, str]:
    """What is read of each row: what the recipe names, else `messages` before `text`; named sources have no texts."""
    names = {"messages": recipe.messages, "tools": recipe.tools, "text": recipe.text}
    if recipe.name != "files" or recipe.messages is not None:
        names["messages"] = names["messages"] or "messages"
    elif recipe.text is None:
        names |= {"messages": "messages", "text": "text"}
    if names["messages"]:
        names["tools"] = names["tools"] or "tools"
    return {meaning: name for meaning, name in names.items() if name}


def shuffled(shards: Sequence[Shard], seed: int) -> tuple[Shard, ...]:
    """Shards in an order that depends on their names and the seed only."""
    ordered = sorted(shards, key=lambda shard: shard.name)
    random.Random(derive_seed(seed, "shards")).shuffle(ordered)
    return tuple(ordered)


def choose_split(name: str, shards: Sequence[Shard], held_out: bool) -> tuple[list[Shard], bool]:
    """The shards of the wanted split, and whether it is the dataset's own: ultrachat's train_sft and test_sft."""
    train, test = ([shard for shard in shards if part in shard.name] for part in ("train_sft", "test_sft"))
    if name == "ultrachat" and train:
        return (test, True) if held_out and test else (train, bool(test))
    return list(shards), False


def _local_shards(path: Path, where: str) -> tuple[str, list[Shard]]:
    """A digest of all files' names and contents, and the files."""
    if path.is_file():
        root, names = path.parent, [path.name]
    elif path.is_dir():
        root, names = path, [file.relative_to(path).as_posix() for file in below(path) if file.is_file()]
    else:
        raise CorpusError(f"{where}: no such file or folder; correct the source's path")
    hidden = re.compile(r"(^|/)\.")
    names = sorted(name for name in names if name.endswith(SUFFIXES) and not hidden.search(name))
    if not names:
        raise CorpusError(f"{where} holds no {', '.join(SUFFIXES)} file")
    text = "\n".join(f"{name} {sha256(root / name)}" for name in names)
    shards = [Shard(name, partial(_open_local, root / name)) for name in names]
    return f"sha256:{hashlib.sha256(os.fsencode(text)).hexdigest()}", shards


def _generator_revision(name: str) -> str:
    """Changes with the generator's wording: a resumed run must not go on with other sentences."""
    rows = (GENERATORS[name](0, index) for index in range(3))
    digests = (conversation_id(row["messages"], row.get("tools")) for row in rows)
    return "generator:" + "-".join(digests)


def _open_local(path: Path) -> IO[bytes]:
    return path.open("rb")
