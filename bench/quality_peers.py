"""Train one peer's TopK SAE on given rows, in the peer's own environment; bench/quality.py starts this.

Imports nothing of qwenscope. Each line on stdin is a job {"rows", "dict_size", "k", "lr", "batch", "seed", "out"}; `lr`
null means the peer's default. A tuned job (lr given) also scales what assumes long runs: warmup to 2 % of the steps at
most, and the dead-latent window to 2 % of the rows. Answers {"out", "cpu_seconds" of the
training} once the weights lie there, in the canonical form:
encoder [n, d], encoder_bias [n], decoder [n, d] with unit rows, pre_bias [d] (subtracted before the encoder).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Trainer = tuple[Callable[[Tensor], Any], Callable[[], Weights]]


def saelens(job: dict[str, Any], rows: Tensor, steps: int) -> Trainer:
    """SAELens 6: Adam 3e-4 constant, gradient clipping at 1, its TopK auxiliary loss."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    config = TopKTrainingSAEConfig(
        d_in=rows.shape[1], d_sae=job["dict_size"], k=job["k"], device="cpu", dtype="float32"
    )
    sae = TopKTrainingSAE(config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=job["lr"] or 3e-4)
    window = 1000 if job["lr"] is None else max(1, steps // 50)  # forward passes
    idle = torch.zeros(job["dict_size"])
    done = 0

    def step(x: Tensor) -> None:
        nonlocal done
        done += 1
        output = sae.training_forward_pass(TrainStepInput(x, {}, idle > window, done, False))
        with torch.no_grad():
            fired = (output.feature_acts > 0).any(0)
            idle.add_(1).mul_(~fired)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def weights() -> Weights:
        sae.fold_W_dec_norm()
        assert sae.cfg.apply_b_dec_to_input
        return {"encoder": sae.W_enc.T, "encoder_bias": sae.b_enc, "decoder": sae.W_dec, "pre_bias": sae.b_dec}

    return step, weights


def dictionary_learning(job: dict[str, Any], rows: Tensor, steps: int) -> Trainer:
    """dictionary_learning: Adam, 2e-4 / sqrt(n / 16384), geometric-median bias, aux-k with d / 2 dead latents."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    tuned = job["lr"] is not None
    warmup = max(1, steps // 50) if tuned else min(1000, steps - 1)
    trainer = TopKTrainer(
        steps, rows.shape[1], job["dict_size"], job["k"], 0, "none",
        lr=job["lr"], warmup_steps=min(warmup, 1000), device="cpu", seed=job["seed"],
    )  # fmt: skip
    if tuned:
        trainer.dead_feature_threshold = len(rows) // 50
    done = -1

    def step(x: Tensor) -> None:
        nonlocal done
        done += 1
        trainer.update(done, x)

    def weights() -> Weights:
        ae = trainer.ae
        return {
            "encoder": ae.encoder.weight,
            "encoder_bias": ae.encoder.bias,
            "decoder": ae.decoder.weight.T,
            "pre_bias": ae.b_dec,
        }

    return step, weights


def sparsify(job: dict[str, Any], rows: Tensor, steps: int, *, adam: bool = False) -> Trainer:
    """sparsify: loss FVU, bias from the first batch's mean; signum (its default) or Adam with linear decay."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from transformers import get_linear_schedule_with_warmup

    sae = SparseCoder(
        rows.shape[1], SparseCoderConfig(num_latents=job["dict_size"], k=job["k"]), device="cpu", dtype=torch.float32
    )
    scale = (job["dict_size"] / 2**14) ** 0.5
    if adam:
        optimizer: Any = torch.optim.Adam(sae.parameters(), lr=job["lr"] or 2e-4 / scale)
        warmup = 1000 if job["lr"] is None else max(1, steps // 50)
        schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    else:
        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=job["lr"] or 5e-3 / scale), momentum=0.95)
        optimizer.train()
        schedule = None
    sae.b_dec.data = rows[: job["batch"]].mean(0)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        sae(x=x, dead_mask=None).fvu.backward()  # auxk_alpha is 0 by default
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()

    def weights() -> Weights:
        if not adam:
            optimizer.eval()
        sae.set_decoder_norm_to_unit_norm()
        return {
            "encoder": sae.encoder.weight,
            "encoder_bias": sae.encoder.bias,
            "decoder": sae.W_dec,
            "pre_bias": sae.b_dec,
        }

    return step, weights


def sparsify_adam(job: dict[str, Any], rows: Tensor, steps: int) -> Trainer:
    """sparsify with its Adam option."""
    return sparsify(job, rows, steps, adam=True)


PEERS = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "sparsify_adam": sparsify_adam,
}


def main() -> None:
    torch.set_num_threads(1)
    build = PEERS[sys.argv[1]]
    for line in sys.stdin:
        job = json.loads(line)
        rows = torch.load(job["rows"], weights_only=True)
        torch.manual_seed(job["seed"])
        batches = [batch for batch in rows.split(job["batch"]) if len(batch) == job["batch"]]
        started = time.process_time()
        step, weights = build(job, rows, len(batches))
        for batch in batches:
            step(batch)
        cpu_seconds = time.process_time() - started
        trained = {name: value.detach().clone().contiguous() for name, value in weights().items()}
        torch.save(trained, job["out"])
        print(json.dumps({"out": job["out"], "cpu_seconds": cpu_seconds}), flush=True)


if __name__ == "__main__":
    main()
