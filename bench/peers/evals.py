"""SAELens' run_evals beside our own figures of the same SAEs on the same tokens; docs/formats.md has the table.

    PYTHONPATH=src .venv/bin/python bench/peers/evals.py RUN PEERS/saelens/bin/python [SAE_ID ...]

RUN is a run of the packaged stand-in model; the texts are this repository's documentation.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from qwenscope import load_suite
from qwenscope.lm.forward import site_rows
from qwenscope.lm.hooks import intervene
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.lm.standin import STANDIN_FOLDER
from qwenscope.recipe import LMRecipe
from qwenscope.sae.formats import export_suite
from qwenscope.sae.sae import SAE

ROOT = Path(__file__).parents[2]
PEER = {
    "CE clean": ("model_performance_preservation", "ce_loss_without_sae"),
    "CE spliced": ("model_performance_preservation", "ce_loss_with_sae"),
    "CE zeroed": ("model_performance_preservation", "ce_loss_with_ablation"),
    "KL spliced": ("model_behavior_preservation", "kl_div_with_sae"),
    "EV": ("reconstruction_quality", "explained_variance"),
    "MSE": ("reconstruction_quality", "mse"),
    "L0": ("sparsity", "l0"),
}


@torch.no_grad()
def ours(lm: LanguageModel, sae: SAE, spliced_CT: Tensor, read_CT: Tensor) -> dict[str, float]:
    """The same figures by our own hooks and encoder: losses on the first batch, rows of the second."""
    site = Site.of(sae.config["layer"])
    clean = lm.model(spliced_CT).logits.log_softmax(-1)
    with intervene(lm, {site: lambda x: sae(x.flatten(0, -2)).view_as(x)}):
        spliced = lm.model(spliced_CT).logits.log_softmax(-1)
    with intervene(lm, {site: torch.zeros_like}):
        zeroed = lm.model(spliced_CT).logits.log_softmax(-1)
    x_RD = site_rows(lm, read_CT, [site])[site].float().flatten(0, 1)
    error_RD = x_RD - sae(x_RD)

    def ce(logits: Tensor) -> float:
        return -float(logits[:, :-1].gather(2, spliced_CT[:, 1:, None]).mean())

    return {
        "CE clean": ce(clean),
        "CE spliced": ce(spliced),
        "CE zeroed": ce(zeroed),
        "KL spliced": float((clean.exp() * (clean - spliced)).sum(-1).mean()),
        "EV": 1 - float(error_RD.square().sum() / (x_RD - x_RD.mean(0)).square().sum()),
        "MSE": float(error_RD.square().sum(1).mean()),
        "L0": float((sae.encode(x_RD).values > 0).sum(1).float().mean()),
    }


def main(run: str, python: str, *sae_ids: str) -> None:
    """Print one row per SAE and figure: SAELens', ours, the difference."""
    saes = load_suite(run)
    lm = load_language_model(LMRecipe(model=str(STANDIN_FOLDER), dtype="float32"), lm_head=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_suite(run, "saelens", folder / "saelens")
        texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
        (folder / "texts.json").write_text(json.dumps(texts))
        script = Path(__file__).with_name("saelens_evals.py")
        for sae_id in sae_ids or saes:
            paths = [folder / "saelens" / sae_id, STANDIN_FOLDER, folder / "texts.json", folder / "out.pt"]
            subprocess.run([python, str(script), *map(str, paths)], check=True, env={"HF_HUB_OFFLINE": "1"})
            found = torch.load(folder / "out.pt", weights_only=True)
            mine = ours(lm, saes[sae_id], *found["tokens"])
            for figure, (group, key) in PEER.items():
                theirs = found["figures"][group][key]
                difference = mine[figure] - theirs
                print(f"{sae_id:20} {figure:10} {theirs:12.6f} {mine[figure]:12.6f} {difference:+.1e}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
