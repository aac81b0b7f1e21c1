"""SAELens' own run_evals on an export of ours, in SAELens' environment; imports nothing of qwenscope.

python saelens_evals.py SAE_FOLDER MODEL TEXTS.json OUT.pt; bench/peers/evals.py starts this, with our figures beside.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler

PROMPTS = 4


def main(folder: str, model_name: str, texts: str, out: str) -> None:
    """Save {"figures", "tokens": the batches read, in order}; each batch is int64 [PROMPTS, context_size]."""
    torch.set_num_threads(1)
    sae = SAE.load_from_disk(folder)
    metadata = sae.cfg.metadata
    sae.fold_W_dec_norm()  # as SAEDashboard does before anything else
    model = load_model(metadata.model_class_name, model_name, "cpu", {"dtype": torch.float32})
    data = Dataset.from_list([{"text": text} for text in json.loads(Path(texts).read_text())])
    store = ActivationsStore.from_sae(
        model, sae, data, streaming=False, store_batch_size_prompts=PROMPTS, sequence_separator_token=None
    )
    read, batches = store.get_batch_tokens, []

    def get_batch_tokens(*args: Any, **options: Any) -> torch.Tensor:
        batches.append(read(*args, **options))
        return batches[-1]

    store.get_batch_tokens = get_batch_tokens  # type: ignore[method-assign]
    config = EvalConfig(
        batch_size_prompts=PROMPTS,
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    figures, _ = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=False)
    torch.save({"figures": figures, "tokens": batches}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
