"""Random single-bit flips and truncations of files, one at a time, each undone before the next."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qwenscope.corpus.repair import Dropped
from qwenscope.errors import QwenscopeError


def damaged(files: Iterable[Path], flips: int, truncations: int, seed: int) -> Iterator[Path]:
    """Yields the file that is damaged just now: first `flips` times by one bit, then `truncations` times in length."""
    sound = {path: path.read_bytes() for path in sorted(files)}
    draw = random.Random(seed)
    for trial in range(flips + truncations):
        victim = draw.choice(list(sound))
        data = bytearray(sound[victim])
        if trial < flips:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data)) :]
        victim.write_bytes(data)
        yield victim
        victim.write_bytes(sound[victim])


def refusal(act: Callable[[], Any]) -> str | None:
    """What `act` refuses with: one line that can be shown; None where it succeeds. Any other error goes through."""
    try:
        act()
    except (QwenscopeError, Dropped) as error:
        message = str(error)
    else:
        return None
    assert message.isprintable()
    assert message == message.strip()
    assert message
    assert not message.endswith(":")
    return message
