"""delphi's own loader and latent cache on an export of ours, in an environment with eai-delphi; nothing of qwenscope.

python delphi_cache.py SAE_FOLDER MODEL_FOLDER LAYER TEXTS.json OUT.json; bench/peers/readers.py starts this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from delphi.latents.cache import LatentCache
from delphi.sparse_coders.load_sparsify import load_sparsify_hooks
from transformers import AutoModel, AutoTokenizer

LENGTH = 128


def main(folder: str, model_folder: str, layer: str, texts: str, out: str) -> None:
    """Save {"tokens": [C, T] read, "density": of all latents, "sum": of all activations}."""
    torch.set_num_threads(1)
    model = AutoModel.from_pretrained(model_folder, dtype=torch.float32).eval()
    hooks, transcode = load_sparsify_hooks(model, str(Path(folder).parent), [f"layers.{layer}"])
    ids = AutoTokenizer.from_pretrained(model_folder)("\n".join(json.loads(Path(texts).read_text())))["input_ids"]
    tokens = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)[:32]
    cache = LatentCache(model, hooks, batch_size=8, transcode=transcode)
    cache.run(tokens.numel(), tokens)
    (name,) = cache.hookpoint_firing_counts
    density = (cache.hookpoint_firing_counts[name].double() / tokens.numel()).tolist()
    total = float(cache.cache.latent_activations[name].double().sum())
    Path(out).write_text(json.dumps({"tokens": tokens.tolist(), "density": density, "sum": total}))


if __name__ == "__main__":
    main(*sys.argv[1:])
