"""SAELens loads a released repository as it is, through its own Hub path (QWENSCOPE_PEERS, see docs/formats.md)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from exact_saes import exact_rows, exact_sae
from made_run import POINTS
from writable_hub import WritableHub

from qwenscope.release.push import push

CODE = """
import sys, torch
from sae_lens import SAE

sae = SAE.from_pretrained("org/saes", "saelens/sae_attn_mid")
codes = sae.encode(torch.load(sys.argv[1], weights_only=True))
metadata = sae.cfg.metadata
torch.save({"codes": codes, "reconstruction": sae.decode(codes)}, sys.argv[2])
print(metadata.model_name, metadata.hook_name)
"""


@pytest.mark.slow
def test_saelens_loads_a_pushed_release(released: Path, hub: WritableHub, tmp_path: Path) -> None:
    folder = os.environ.get("QWENSCOPE_PEERS")
    python = Path(folder or "", "saelens/bin/python")
    if not folder or not python.exists():
        pytest.skip("QWENSCOPE_PEERS names no folder with an environment saelens; see docs/formats.md")
    push(released, "org/saes")
    torch.save(exact_rows(), tmp_path / "rows.pt")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [python, "-c", CODE, tmp_path / "rows.pt", tmp_path / "result.pt"],
        env=environment | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("Qwen/Qwen3.5-35B-A3B model.layers.23")
    result, sae = torch.load(tmp_path / "result.pt", weights_only=True), exact_sae(list(POINTS).index("sae_attn_mid"))
    assert torch.equal(result["codes"], sae.encode(exact_rows()).dense())
    assert torch.equal(result["reconstruction"], sae(exact_rows()))
