"""Exports are loaded by the libraries they are for, each in an environment of its own, and come back to the bit.

QWENSCOPE_PEERS names the folder of those environments; docs/formats.md says how to make them.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from exact_saes import exact_rows, exact_sae, same

from qwenscope import TopKSAE, load_suite
from qwenscope.sae.formats import export_suite, import_suite

PEERS = ("saelens", "sparsify", "dictionary_learning")
SCRIPT = Path(__file__).with_name("peer_codes.py")


def through_peer(
    name: str, sae: TopKSAE, x_BD: torch.Tensor, tmp_path: Path
) -> tuple[dict[str, torch.Tensor], TopKSAE]:
    """What the peer computes from our export, and our import of what the peer saved."""
    folder = os.environ.get("QWENSCOPE_PEERS")
    python = Path(folder or "", name, "bin/python")
    if not folder or not python.exists():
        pytest.skip(f"QWENSCOPE_PEERS names no folder with an environment {name}; see docs/formats.md")
    sae.save(tmp_path / "suite/sae_a")
    torch.save(x_BD, tmp_path / "rows.pt")
    export_suite(tmp_path / "suite", name, tmp_path / "there")
    # Without our key in its configuration the peer's file alone has to suffice.
    (folder_there,) = {path.parent for path in (tmp_path / "there").rglob("c*.json")}
    command = [python, SCRIPT, name, folder_there, tmp_path / "rows.pt", tmp_path / "result.pt"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, tmp_path / "resaved/sae_a"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    import_suite(tmp_path / "resaved", name, tmp_path / "back")
    (back,) = load_suite(tmp_path / "back").values()
    return torch.load(tmp_path / "result.pt", weights_only=True), back


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_codes_and_reconstruction_are_the_peers_to_the_bit(name: str, tmp_path: Path) -> None:
    """On SAEs and rows whose arithmetic is exact, so that the order of summation in a kernel cannot matter."""
    sae, x_BD = exact_sae(layer=7, model="org/model", sae_id="sae_a"), exact_rows(500)
    peer, back = through_peer(name, sae, x_BD, tmp_path)
    assert torch.equal(peer["codes"], sae.encode(x_BD).dense())
    assert torch.equal(peer["reconstruction"], sae(x_BD))
    assert same(back, sae, x_BD)


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_random_weights_return_to_the_bit(name: str, tmp_path: Path) -> None:
    """Whatever the weights: there and back changes no bit, and both sides agree up to float32 rounding."""
    sae = TopKSAE(256, 2048, 32, seed=11)
    torch.nn.init.normal_(sae.pre_bias, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(sae.encoder.bias, std=0.1, generator=torch.Generator().manual_seed(2))
    x_BD = 3 * torch.randn(1000, 256, generator=torch.Generator().manual_seed(3))
    peer, back = through_peer(name, sae, x_BD, tmp_path)
    assert all(torch.equal(back.state_dict()[key], value) for key, value in sae.state_dict().items())
    assert same(back, sae, x_BD)
    ours_BN = sae.encode(x_BD).dense()
    flipped = ((peer["codes"] > 0) != (ours_BN > 0)).any(dim=1)
    assert flipped.float().mean() < 0.001  # near-ties at the k-th place
    torch.testing.assert_close(peer["codes"][~flipped], ours_BN[~flipped], rtol=0, atol=1e-4)
    torch.testing.assert_close(peer["reconstruction"][~flipped], sae(x_BD)[~flipped].detach(), rtol=0, atol=1e-4)
