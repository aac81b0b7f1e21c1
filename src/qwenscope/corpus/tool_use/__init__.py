"""Tool-use conversations of our own: drawn from templates, deterministic in their seed, random access by index.

Conversation `index` is a pure function of (seed, index, held_out): any range can be generated without the ones before
it. The wordings of the train and of the held-out split are disjoint, so held-out conversations are new sentences about
the same tools. All persons, firms, prices and results are invented.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from qwenscope.corpus.tool_use.compose import compose
from qwenscope.corpus.tool_use.dialogues import Dialogue
from qwenscope.errors import CorpusError
from qwenscope.files import atomic_path

__all__ = ["conversation_families", "generate_tool_use", "tool_use_conversation", "write_tool_use"]


def tool_use_conversation(seed: int, index: int, *, held_out: bool = False) -> dict[str, Any]:
    """Conversation number `index` of a seed.

    Returns:
        {"messages": [...], "tools": [...]}: messages {role, content}, assistant turns with calls carry `tool_calls`
        ({type, function: {name, arguments: mapping}}), tool messages a `name`; tools are function definitions with a
        JSON schema of their parameters.
    """
    dialogue, tools = _draw(seed, index, held_out)
    return {"messages": dialogue.messages, "tools": tools}


def conversation_families(seed: int, index: int, *, held_out: bool = False) -> tuple[str, ...]:
    """The template families of a conversation in order, as `split/kind/subject`: `train/single/get_weather`."""
    return tuple(_draw(seed, index, held_out)[0].families)


def generate_tool_use(n: int, seed: int, *, start: int = 0, held_out: bool = False) -> Iterator[dict[str, Any]]:
    """Conversations `start` ... `start + n - 1` of a seed, one by one."""
    for index in range(start, start + n):
        yield tool_use_conversation(seed, index, held_out=held_out)


def write_tool_use(path: Path, n: int, seed: int, *, held_out: bool = False) -> None:
    """Write the first `n` conversations of a seed as JSON lines (compressed for .gz), whole or not at all.

    Raises:
        CorpusError: `n` is not positive, the name is neither .jsonl nor .jsonl.gz, or the folder is missing.
        ResourceError: the disk is full.
    """
    if n < 1:
        raise CorpusError(f"cannot write {n} conversations to {path}; ask for at least 1")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise CorpusError(f"{path} must end in .jsonl or .jsonl.gz")
    if not path.parent.is_dir():
        raise CorpusError(f"the folder {path.parent} does not exist; create it first")
    with atomic_path(path) as temporary, temporary.open("wb") as raw:
        if path.suffix == ".gz":  # no name and no time in the header: the same conversations give the same bytes
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
                file.writelines(_lines(n, seed, held_out))
        else:
            raw.writelines(_lines(n, seed, held_out))


def _lines(n: int, seed: int, held_out: bool) -> Iterator[bytes]:
    for conversation in generate_tool_use(n, seed, held_out=held_out):
        yield json.dumps(conversation, ensure_ascii=False).encode() + b"\n"


def _draw(seed: int, index: int, held_out: bool) -> tuple[Dialogue, list[dict[str, Any]]]:
    key = f"qwenscope/tool-use/{'held-out' if held_out else 'train'}/{seed}/{index}".encode()
    return compose(Random(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest())), held_out)
