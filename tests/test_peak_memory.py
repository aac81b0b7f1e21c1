"""What a hostile file may cost in memory: the peak of a process of its own, before and after it is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
MEBIBYTE = 1 << 20
PEAK = """
import json, resource, sys, zlib
from pathlib import Path
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
"""
CORPUS = """
from qwenscope.corpus.stream import CorpusStream
from qwenscope.lm.load import load_tokenizer
from qwenscope.recipe import CorpusRecipe, LMRecipe, SourceRecipe

path, tokenizer = Path(sys.argv[1]), load_tokenizer(LMRecipe(model="standin"))
def row(megabytes):
    return json.dumps({"messages": [{"role": "user", "content": "ab c" * (megabytes << 18)}]}) + "\\n"
def read():
    corpus = CorpusRecipe(sources=(SourceRecipe(name="files", path=path, weight=1.0),))
    stream = CorpusStream(corpus, tokenizer, seed=0)
    kept = len(list(stream))
    return kept, sum(source["rows_in"] for source in stream.report()["sources"].values())
few = "".join(row(0).replace('""', '"a few words"') for _ in range(3))
path.write_text(few)
assert read() == (3, 3)
with path.open("w") as file:
    for part in (few, row(20), row(15), row(1)):
        file.write(part)
del part
before = peak()
kept, read_in = read()
assert (kept, read_in) == (4, 6), (kept, read_in)
print(peak() - before)
"""
BLOB = """
from qwenscope.errors import FormatError
from qwenscope.features.form import Detail, unpack
from qwenscope.features.store import _DETAIL_LIMIT

deflate = zlib.compressobj(9)
blob = b"".join(deflate.compress(b"[]," * (1 << 20)) for _ in range(40)) + deflate.flush()
assert len(blob) < 2 << 20
before = peak()
for squeezed in (blob, zlib.compress(b"[" + b"[]," * (1 << 20) + b"[]]", 9)):
    try:
        unpack(squeezed, Detail, _DETAIL_LIMIT)
        raise AssertionError("taken")
    except FormatError:
        pass
print(peak() - before)
"""


def grown(code: str, *arguments: object) -> int:
    done = subprocess.run([sys.executable, "-c", PEAK + code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_message_of_20_megabytes_costs_no_gigabyte(tmp_path: Path) -> None:
    assert grown(CORPUS, tmp_path / "rows.jsonl") < 400 * MEBIBYTE


def test_a_blob_of_megabytes_in_an_index_costs_no_gigabyte() -> None:
    """120 MB of JSON, and 3 MB of it in a million lists, each deflated to what a cell may hold."""
    assert grown(BLOB) < 300 * MEBIBYTE
