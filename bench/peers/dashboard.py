"""A page of SAEDashboard from an export of ours, in an environment with sae-dashboard; imports nothing of qwenscope.

python dashboard.py SAE_FOLDER MODEL_FOLDER LAYER TEXTS.json OUT.json; bench/peers/readers.py starts this.

MODEL_FOLDER is a model that TransformerLens' bridge opens. The page goes beside OUT.json, under the ending .html.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE
from transformer_lens.model_bridge import TransformerBridge

LATENTS, LENGTH = range(32), 128


def main(folder: str, model_folder: str, layer: str, texts: str, out: str) -> None:
    """Save {"tokens": [C, T] read, "density": of the first latents on the page, "largest": their activations}."""
    torch.set_num_threads(1)
    sae = SAE.load_from_disk(folder)
    model = TransformerBridge.boot_transformers(model_folder, device="cpu", dtype=torch.float32)
    ids = model.tokenizer("\n".join(json.loads(Path(texts).read_text())))["input_ids"]
    tokens = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)[:32]
    config = SaeVisConfig(f"blocks.{layer}.hook_out", LATENTS, minibatch_size_features=16, minibatch_size_tokens=8)
    found = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    save_feature_centric_vis(found, Path(out).with_suffix(".html"))
    statistics = found.feature_stats
    figures = {"density": list(statistics.frac_nonzero), "largest": list(statistics.max)}
    Path(out).write_text(json.dumps({"tokens": tokens.tolist(), **figures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
