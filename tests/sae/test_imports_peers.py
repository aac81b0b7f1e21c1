"""Imports beside the libraries that made them, each in an environment of its own, and their share of SAELens' registry.

docs/formats.md says how the environments are made.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from foreign_saes import CASES, HIDDEN_DIM
from peers.dictionaries import PEERS, differences
from peers.registry import OPEN, count, registry_of

from qwenscope import load_suite
from qwenscope.sae.formats import export_suite, import_suite

READ = """
import sys, torch
from dictionary_learning.utils import load_dictionary
dictionary, _ = load_dictionary(sys.argv[1], device="cpu")
with torch.no_grad():
    codes = dictionary.encode(torch.load(sys.argv[2]))
    torch.save([codes, dictionary.decode(codes)], sys.argv[3])
"""


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
    assert len(found) == {"saelens": 25, "sparsify": 1, "dictionary_learning": 6}[peer]
    for kind, difference in found.items():
        assert difference.flipped == 0, kind
        assert max(difference.codes, difference.reconstruction) < 1e-5, kind


@pytest.mark.slow
def test_the_registry_is_covered_as_the_docs_say(environments: Path) -> None:
    releases, saes = count(registry_of(environments))
    assert (sum(releases.values()), releases[OPEN]) == (170, 167)
    assert (sum(saes.values()), saes[OPEN]) == (13857, 13818)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["saelens jumprelu", "saelens gated", "saelens standard", "saelens matryoshka"])
def test_dictionary_learning_loads_what_is_exported(environments: Path, case: str, tmp_path: Path) -> None:
    """JumpReLU, a gated SAE as JumpReLU, ReLU and Matryoshka, by the loader that looks at `dict_class`."""
    other = CASES[case](tmp_path / "there", 3)
    import_suite(other.source, other.origin, tmp_path / "suite")
    (sae,) = load_suite(tmp_path / "suite").values()
    export_suite(tmp_path / "suite", "dictionary_learning", tmp_path / "out")
    (path,) = (tmp_path / "out").rglob("ae.pt")
    x_BD = torch.randn(300, HIDDEN_DIM, generator=torch.Generator().manual_seed(4))
    torch.save(x_BD, tmp_path / "rows.pt")
    python = environments / "dictionary_learning/bin/python"
    files = [str(path.parent), str(tmp_path / "rows.pt"), str(tmp_path / "result.pt")]
    subprocess.run([python, "-c", READ, *files], check=True, timeout=600, cwd=tmp_path)
    codes_BN, rows_BD = torch.load(tmp_path / "result.pt", weights_only=True)
    ours_BN = sae.encode(x_BD).dense().detach()
    if case == "saelens standard":  # loaded with the decoder's norms in the encoder
        ours_BN = ours_BN * sae.decoder.weight.detach().norm(dim=0)
    assert torch.equal(codes_BN > 0, ours_BN > 0)
    torch.testing.assert_close(codes_BN, ours_BN, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows_BD, sae(x_BD).detach(), rtol=0, atol=1e-5)
