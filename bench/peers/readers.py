"""What SAEDashboard and delphi find in exports of ours, beside our own codes of the same tokens (docs/formats.md).

    PYTHONPATH=src .venv/bin/python bench/peers/readers.py RUN MODEL_FOLDER LAYER [--dashboard PYTHON] [--delphi PYTHON]

RUN has an SAE on the residual stream after LAYER of the model in MODEL_FOLDER; each PYTHON is that of an environment
with the peer, sae-dashboard or eai-delphi. The texts are this repository's documentation; the page is left in
runs/dashboard.html.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from qwenscope import load_suite
from qwenscope.lm.forward import site_rows
from qwenscope.lm.load import load_language_model
from qwenscope.lm.sites import Site
from qwenscope.recipe import LMRecipe
from qwenscope.sae.formats import export_suite

ROOT = Path(__file__).parents[2]


def found_by(
    script: str, python: str, sae_folder: Path, options: argparse.Namespace, folder: Path
) -> dict[str, list[float]]:
    """What a peer's script saved."""
    texts, out = folder / "texts.json", folder / f"{script}.json"
    texts.write_text(json.dumps([path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))[:3]]))
    command = [python, Path(__file__).with_name(f"{script}.py"), sae_folder, options.model, options.layer, texts, out]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    subprocess.run([str(part) for part in command], check=True, env=environment, stderr=subprocess.DEVNULL)
    return dict(json.loads(out.read_text()))


@torch.no_grad()
def our_codes(sae_id: str, tokens: list[float], options: argparse.Namespace) -> Tensor:
    """Dense codes of the tokens' rows [rows, N]."""
    site = Site.of(options.layer)
    sae = load_suite(options.run)[sae_id]
    lm = load_language_model(LMRecipe(model=options.model, dtype="float32", device="cpu"), last_layer=options.layer)
    codes = sae.encode(site_rows(lm, torch.tensor(tokens), [site])[site].float().flatten(0, 1))
    return torch.zeros(len(codes.values), sae.dict_size).scatter_(1, codes.indices, codes.values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("model")
    parser.add_argument("layer", type=int)
    parser.add_argument("--dashboard")
    parser.add_argument("--delphi")
    options = parser.parse_args()
    (sae_id,) = [key for key, sae in load_suite(options.run).items() if sae.config["layer"] == options.layer]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.dashboard:
            export_suite(options.run, "saelens", folder / "saelens")
            theirs = found_by("dashboard", options.dashboard, folder / "saelens" / sae_id, options, folder)
            codes = our_codes(sae_id, theirs["tokens"], options)[:, : len(theirs["density"])]
            largest = torch.tensor(theirs["largest"])
            difference = ((codes.max(0).values - largest).abs() / largest.clamp_min(1e-9)).max()
            print(f"SAEDashboard: densities {apart(codes, theirs)}; largest activations by {difference:.1e}")
            shutil.copy(folder / "dashboard.html", "runs/dashboard.html")
        if options.delphi:
            export_suite(options.run, "sparsify", folder / "sparsify")
            theirs = found_by(
                "delphi_cache", options.delphi, folder / "sparsify" / f"layers.{options.layer}", options, folder
            )
            codes = our_codes(sae_id, theirs["tokens"], options)
            total = float(codes.double().sum())
            print(f"delphi: densities {apart(codes, theirs)}; sum of activations {theirs['sum']:.3f}, ours {total:.3f}")


def apart(codes: Tensor, theirs: dict[str, list[float]]) -> str:
    """How far densities are from each other, in words."""
    difference = ((codes > 0).double().mean(0) - torch.tensor(theirs["density"]).double()).abs().max()
    return f"of {codes.shape[1]} latents on {len(codes):,} tokens differ by {difference:.1e} at most"


if __name__ == "__main__":
    main()
