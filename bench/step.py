"""Time one training step: ours, the peers', and the two floors, as ratios to one float32 product `x @ W_enc.T`.

    python bench/step.py --shape 16384/64 --shape 16384/96 --shape 8192/128 --repeats 5 --json step.json
    python bench/step.py --shape 16384/64 --dead-share 0.1 --trainer ours-exact
    python bench/step.py --shape 16384/64 --peer saelens=ENV/bin/python --peer sparsify=ENV/bin/python \
        --peer dictionary_learning=ENV/bin/python

Each environment gets one worker process that measures its own floor between its trainers, so that every ratio is taken
within one process; workers take turns, one repetition each, and the medians of process CPU time count. Peers live in
environments of their own (this file imports nothing but torch there). One thread unless --threads says otherwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

OURS = ("ours-exact", "ours-bf16", "ours-fp32", "first")
HIDDEN = 2048
Step = Callable[[Tensor], Any]


def make_rows(batch: int, seed: int = 0) -> Tensor:
    """Rows of a low-rank signal in noise, [batch, HIDDEN]: the same signal, other rows, for each seed."""
    mixer = torch.randn(256, HIDDEN, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(batch, 256, generator=generator) @ mixer / 16
    return signal + 0.5 * torch.randn(batch, HIDDEN, generator=generator)


def dead_latents(latents: int, share: float) -> Tensor:
    """Bool [N]: `share` of the latents, evenly spread."""
    steps = torch.floor(torch.arange(latents + 1, dtype=torch.float64) * share)
    return steps.diff() > 0


def ours(precision: str, latents: int, k: int, dead: Tensor, x: Tensor) -> tuple[Step, dict[str, Step]]:
    """Our trainer, and its phases by name."""
    from qwenscope.sae import ops
    from qwenscope.sae.sae import TopKSAE
    from qwenscope.training.optimizer import BLOCK_ROWS
    from qwenscope.training.trainer import SAETrainer

    trainer = SAETrainer(TopKSAE(HIDDEN, latents, k, seed=0), 1e-4, precision=precision)  # type: ignore[arg-type]
    trainer.calibrate(x[:1024])
    weights = trainer.weights
    weights["encoder"][dead] *= 0.05  # too short to reach the top-k
    weights.refresh("encoder")

    def step(rows: Tensor) -> None:
        trainer.ages.tokens_N[dead] = trainer.ages.dead_after_tokens
        trainer.step(rows)

    def select(rows: Tensor) -> Any:
        return trainer.active.selector(rows, weights["encoder"], weights.encoder, weights["encoder_bias"])

    found = select(x - weights["pre_bias"])
    pairs = ops.Pairs.of(found.indices, latents)
    values_P, table = pairs.sort(found.values), weights.decoder
    panels = ops.Panels.of(x)
    gathered = panels.to(table.dtype)
    phases = {
        "selection": select,
        "decode": lambda rows: ops.decode(table, found.indices, found.values),
        "pair products": lambda rows: pairs.products(weights["decoder"], panels),
        "one gradient matrix": lambda rows: [
            pairs.latent_rows(gathered, values_P, start, min(start + BLOCK_ROWS, latents))
            for start in range(0, latents, BLOCK_ROWS)
        ],
    }
    return step, phases


class FirstImplementation(nn.Module):
    """The project's first trainer, from its description: dense autograd, a second encode, a pass for high-loss rows."""

    def __init__(self, latents: int, k: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(HIDDEN, latents)
        self.decoder = nn.Linear(latents, HIDDEN, bias=False)
        self.pre_bias = nn.Parameter(torch.zeros(HIDDEN))
        self.k = k
        self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-4)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.encoder(x - self.pre_bias)
        values, indices = pre.relu().topk(self.k, dim=1)
        return torch.zeros_like(pre).scatter(1, indices, values), pre

    def step(self, x: Tensor, dead: Tensor) -> None:
        codes, pre = self.encode(x)
        x_hat = self.decoder(codes) + self.pre_bias
        loss = (x - x_hat).square().mean()
        if dead.any():
            values, indices = pre.relu().masked_fill(~dead, -torch.inf).topk(min(self.k, int(dead.sum())), dim=1)
            aux = torch.zeros_like(pre).scatter(1, indices, values)
            loss = loss + (self.decoder(aux) - (x - x_hat).detach()).square().mean() / 32
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.decoder.weight /= self.decoder.weight.norm(dim=0, keepdim=True)
            self.encode(x)[0].sum(0)  # firing counts
            codes, _ = self.encode(x)  # high-loss rows for the resampling pool
            (x - self.decoder(codes) - self.pre_bias).square().sum(1).topk(32)


def saelens(latents: int, k: int, dead: Tensor, device: str = "cpu") -> Step:
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=HIDDEN, d_sae=latents, k=k, device=device, dtype="float32"))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    mask = dead if dead.any() else None

    def step(x: Tensor) -> None:
        output = sae.training_forward_pass(TrainStepInput(x, {}, mask, 1, False))
        output.feature_acts.bool().float().sum(0)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def dictionary_learning(latents: int, k: int, dead: Tensor, device: str = "cpu") -> Step:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(10**6, HIDDEN, latents, k, layer=0, lm_name="none", lr=1e-4, device=device, seed=0)

    def step(x: Tensor) -> None:
        trainer.num_tokens_since_fired[dead] = trainer.dead_feature_threshold
        trainer.update(1, x)

    return step


def sparsify(latents: int, k: int, dead: Tensor, device: str = "cpu") -> Step:
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    sae = SparseCoder(HIDDEN, SparseCoderConfig(num_latents=latents, k=k), device=device, dtype=torch.float32)
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=5e-3), momentum=0.95)
    optimizer.train()
    mask = dead if dead.any() else None

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        output = sae(x=x, dead_mask=mask)
        (output.fvu + (output.auxk_loss / 32 if mask is not None else 0.0)).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


PEERS = {"saelens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}


def seconds(step: Step, x: Tensor) -> float:
    """Process CPU seconds of one call."""
    begin = time.process_time()
    step(x)
    return time.process_time() - begin


def peak_bytes(step: Step, x: Tensor) -> int:
    """Most memory that a call's tensors took beyond what was allocated before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(x)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), initial=0))


def work(names: list[str], latents: int, k: int, batch: int, dead_share: float, threads: int, phases: bool) -> None:
    """A worker: for each line on stdin, time everything once and print the seconds as one JSON line."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x, dead = make_rows(batch), dead_latents(latents, dead_share)
    weight = torch.randn(latents, HIDDEN) / HIDDEN**0.5
    shadow, x_shadow = weight.bfloat16(), x.bfloat16()
    timed: dict[str, Step] = {
        "floor fp32": lambda rows: torch.mm(rows, weight.T),
        "floor bf16": lambda rows: torch.mm(x_shadow, shadow.T),
    }
    for name in names:
        if name.startswith("ours-"):
            timed[name], parts = ours(name.removeprefix("ours-"), latents, k, dead, x)
            if phases:
                timed |= {f"{name}: {part}": function for part, function in parts.items()}
        elif name == "first":
            timed[name] = partial(FirstImplementation(latents, k).step, dead=dead)
        else:
            timed[name] = PEERS[name](latents, k, dead)
    for step in timed.values():
        step(x)
    peaks = {name: peak_bytes(timed[name], x) for name in names}
    print(json.dumps({"ready": torch.__version__, "peaks": peaks}), flush=True)
    for turn, _ in enumerate(sys.stdin):
        x = make_rows(batch, seed=2 + turn)  # a batch seen again and again is overfitted, and no longer typical
        print(json.dumps({name: seconds(step, x) for name, step in timed.items()}), flush=True)


def start(
    python: str, names: list[str], shape: str, options: argparse.Namespace
) -> tuple[subprocess.Popen[str], dict[str, int]]:
    """Start a worker; returns it, warmed up, with its trainers' peak memory."""
    command = [python, __file__, "--worker", ",".join(names), "--shape", shape, "--batch", str(options.batch)]
    command += ["--dead-share", str(options.dead_share), "--threads", str(options.threads)]
    command += ["--phases"] if options.phases else []
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return worker, answer(worker)["peaks"]


def answer(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """The worker's next JSON line (peers may print other lines)."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            result: dict[str, Any] = json.loads(line)
            return result
    raise SystemExit(f"a worker died: {worker.args}")


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Medians and ratios for one shape, workers taking turns."""
    started = [start(sys.executable, options.trainer, shape, options)]
    for peer in options.peer:
        name, _, python = peer.partition("=")
        started.append(start(python, [name], shape, options))
    workers = [worker for worker, _ in started]
    peaks = {name: peak for _, known in started for name, peak in known.items()}
    times: list[dict[str, list[float]]] = [{} for _ in workers]
    for _ in range(options.repeats):
        for worker, seen in zip(workers, times, strict=True):
            assert worker.stdin is not None
            print(file=worker.stdin, flush=True)
            for name, value in answer(worker).items():
                seen.setdefault(name, []).append(value)
    for worker in workers:
        worker.communicate()
    rows: dict[str, dict[str, Any]] = {}
    for seen in times:
        fp32, bf16 = median(seen["floor fp32"]), median(seen["floor bf16"])
        for name, values in seen.items():
            if not name.startswith("floor") or name not in rows:
                middle = median(values)
                rows[name] = {"seconds": middle, "per_fp32_product": middle / fp32, "per_bf16_product": middle / bf16}
                if name in peaks:
                    rows[name]["peak_bytes"] = peaks[name]
    return {"shape": shape, "batch": options.batch, "dead_share": options.dead_share, "trainers": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="latents/k, several allowed (default 16384/64)")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dead-share", type=float, default=0.0, help="share of latents that are dead")
    parser.add_argument("--phases", action="store_true", help="time the parts of our step too")
    parser.add_argument("--trainer", action="append", choices=OURS, help="ours to time (default: all)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"one of {', '.join(PEERS)}")
    parser.add_argument("--json", help="write the result here too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes, options.trainer = options.shape or ["16384/64"], options.trainer or list(OURS)
    if options.worker:
        latents, k = map(int, shapes[0].split("/"))
        work(options.worker.split(","), latents, k, options.batch, options.dead_share, options.threads, options.phases)
        return
    machine = {"python": platform.python_version(), "torch": torch.__version__, "capability": capability()}
    result = {"machine": machine, "results": [measure(shape, options) for shape in shapes]}
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")


def capability() -> str:
    """The processor as torch sees it."""
    return f"{torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"


if __name__ == "__main__":
    main()
