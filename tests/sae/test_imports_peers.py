"""Imports beside the libraries that made them, each in an environment of its own, and their share of SAELens' registry.

docs/formats.md says how the environments are made.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from peers.dictionaries import PEERS, differences
from peers.registry import OPEN, count, registry_of


@pytest.fixture
def environments() -> Path:
    folder = os.environ.get("QWENSCOPE_PEERS")
    if not folder:
        pytest.skip("QWENSCOPE_PEERS names no folder of environments; see docs/formats.md")
    return Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("peer", PEERS)
def test_codes_and_reconstructions_are_the_home_librarys(
    environments: Path, peer: str, seed: int, tmp_path: Path
) -> None:
    found = differences(environments / peer / "bin/python", peer, seed, tmp_path / "made")
    assert len(found) == {"saelens": 14, "sparsify": 1, "dictionary_learning": 6}[peer]
    for kind, difference in found.items():
        assert difference.flipped == 0, kind
        assert max(difference.codes, difference.reconstruction) < 1e-5, kind


@pytest.mark.slow
def test_the_registry_is_covered_as_the_docs_say(environments: Path) -> None:
    releases, saes = count(registry_of(environments))
    assert (sum(releases.values()), releases[OPEN]) == (170, 109)
    assert (sum(saes.values()), saes[OPEN]) == (13857, 7429)
