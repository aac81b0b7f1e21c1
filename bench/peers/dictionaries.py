"""Every kind of SAE that is imported, made, saved and run by its home library: our codes and reconstructions beside it.

    PYTHONPATH=src .venv/bin/python bench/peers/dictionaries.py PEERS [SEEDS]

PEERS is the folder of environments that `make peers` made; docs/formats.md has the table. Prints a line per kind: the
rows, those of them whose active latents differ, and the largest differences of codes and of reconstructions.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from qwenscope import load_suite
from qwenscope.lm.sites import NORMS, Site
from qwenscope.sae.formats import import_suite

PEERS = ("saelens", "sparsify", "dictionary_learning")
SCRIPT = Path(__file__).with_name("made_by_peers.py")


@dataclass(frozen=True)
class Difference:
    """Ours against the home library's, over all rows of a suite."""

    rows: int
    flipped: int
    """Rows in which other latents are active."""
    codes: float
    reconstruction: float

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            self.rows + other.rows,
            self.flipped + other.flipped,
            max(self.codes, other.codes),
            max(self.reconstruction, other.reconstruction),
        )


def differences(python: Path, peer: str, seed: int, folder: Path) -> dict[str, Difference]:
    """{kind: how far ours are from it} for all kinds of one peer, made in the new `folder`."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(python), str(SCRIPT), peer, str(folder), str(seed)]
    folder.mkdir(parents=True)
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = {}
    for path in sorted(folder.glob("*.pt")):
        wanted = torch.load(path, weights_only=True)
        import_suite(folder / path.stem, wanted["origin"], folder / "imported" / path.stem)
        (sae,) = load_suite(folder / "imported" / path.stem).values()
        norm = Site(sae.config.get("site", "layers.0")).norm if "_norm" in path.stem else None  # those that do it
        rows_BD, back = NORMS[norm](wanted["rows"]) if norm else (wanted["rows"], torch.clone)
        with torch.no_grad():
            codes = sae.encode(rows_BD)
            codes_BN, reconstruction_BD = codes.dense(), back(sae.reconstruct(rows_BD, codes))
        found[path.stem] = Difference(
            len(codes_BN),
            int(((codes_BN > 0) != (wanted["codes"] > 0)).any(1).sum()),
            float((codes_BN - wanted["codes"]).abs().max()),
            float((reconstruction_BD - wanted["reconstruction"]).abs().max()),
        )
    return found


def main(peers: Path, seeds: int) -> None:
    torch.set_num_threads(1)
    print(f"{'home library and kind':46} {'rows':>5} {'flipped':>7} {'codes':>8} {'reconstruction':>14}")
    for peer in PEERS:
        total: dict[str, Difference] = {}
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                for kind, found in differences(peers / peer / "bin/python", peer, seed, Path(folder, "made")).items():
                    total[kind] = total[kind] + found if kind in total else found
        for kind, found in total.items():
            numbers = f"{found.rows:5} {found.flipped:7} {found.codes:8.1e} {found.reconstruction:14.1e}"
            print(f"{f'{peer} {kind}':46} {numbers}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
