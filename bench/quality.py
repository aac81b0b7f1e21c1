"""Compare the quality of SAEs: our recipes and the peers', on the same rows, seeds and learning-rate grid.

    python bench/quality.py --data synthetic --rows 327680 --seeds 3 --json quality.json \
        --peer saelens=ENV/bin/python --peer dictionary_learning=ENV/bin/python \
        --peer sparsify=ENV/bin/python --peer sparsify_adam=ENV/bin/python
    python bench/quality.py --data standin --layer 6 --layer 22 --layer 35 ...

Every trainer sees each row once, in the same order. Trainers are seeded apart from the data. `tuned` is the grid's
best learning rate on held-out FVU (mean over seeds), `default` the trainer's own settings; quote both. Ours are the
published recipe (card: raw rows, resampling), its learning rate matched to this budget by lr x sqrt(d) x steps, and the
normalised recipe. `truth` starts at the known features and trains with ours: what better optimisation could reach.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from qwenscope.evaluation.fidelity import Fidelity
from qwenscope.evaluation.truth import GroundTruth, cross_seed_stability, ground_truth, recovery
from qwenscope.sae.topk import TopKSAE
from qwenscope.seeds import derive_seed
from qwenscope.training.trainer import SAETrainer

GRID = (4e-4, 1.2e-3, 4e-3, 1.2e-2)
CARD_LR, CARD_DIM, CARD_STEPS = 1e-5, 2048, 48_828  # the published suite's middle learning rate and budget
HELD_OUT = 32_768
OURS = ("published", "ours")
Figures = dict[str, float]


class Data:
    """Training rows, held-out rows, and the known features if there are any."""

    def __init__(self, name: str, train_RD: Tensor, held_out_RD: Tensor, truth: GroundTruth | None = None) -> None:
        self.name, self.train_RD, self.held_out_RD, self.truth = name, train_RD, held_out_RD, truth


def synthetic(options: argparse.Namespace) -> Iterator[Data]:
    """Each kind of known features; directions, training rows and held-out rows have seeds of their own."""
    for kind in options.kind:
        truth = ground_truth(options.dim, options.features, kind=kind, active=options.k, noise=0.02, seed=9001)
        train_RD, _ = truth.sample(options.rows, seed=9002)
        held_out_RD, _ = truth.sample(HELD_OUT, seed=9003)
        yield Data(f"synthetic {kind}", train_RD, held_out_RD, truth)


def standin(options: argparse.Namespace) -> Iterator[Data]:
    """Rows of the stand-in at each asked layer, shuffled; held-out ones from held-out conversations."""
    from qwenscope.activations.harvest import harvest
    from qwenscope.corpus.stream import CorpusStream
    from qwenscope.lm.load import load_language_model
    from qwenscope.recipe import load_recipe

    recipe = load_recipe("standin")
    lm = load_language_model(recipe.lm, last_layer=max(options.layer))

    def rows(count: int, *, held_out: bool) -> dict[int, Tensor]:
        stream = CorpusStream(recipe.corpus, lm.tokenizer, seed=recipe.seed, held_out=held_out)
        conversations, tokens = [], 0
        while tokens < count * 1.05:
            conversations.append(next(stream))
            tokens += len(conversations[-1].token_ids)
        stream.close()
        found = harvest(lm, conversations, options.layer, recipe.activations, recipe.corpus.batch_tokens).rows
        order = torch.randperm(len(found[options.layer[0]]), generator=torch.Generator().manual_seed(9004))[:count]
        return {layer: x_RD[order].float() for layer, x_RD in found.items()}

    train, held_out = rows(options.rows, held_out=False), rows(HELD_OUT, held_out=True)
    for layer in options.layer:
        yield Data(f"standin layer {layer}", train[layer], held_out[layer])


def train_ours(data: Data, name: str, lr: float | None, seed: int, options: argparse.Namespace) -> TopKSAE:
    """The published recipe or the normalised one (`truth` is the latter from the known features on)."""
    dim, rows = data.train_RD.shape[1], len(data.train_RD)
    steps = rows // options.batch
    published = name == "published"
    if lr is None:
        lr = CARD_LR * (CARD_DIM / dim) ** 0.5 * CARD_STEPS / steps if published else options.our_lr
    start = TopKSAE(dim, options.dict_size, options.k, seed=derive_seed(seed, "bench", name))
    if name == "truth":
        assert data.truth is not None
        with torch.no_grad():
            start.decoder.weight[:, : len(data.truth.directions_FD)] = data.truth.directions_FD.T
            start.encoder.weight[: len(data.truth.directions_FD)] = data.truth.directions_FD
    trainer = SAETrainer(
        start,
        lr,
        tokens=steps * options.batch,
        warmup_tokens=steps * options.batch // 50,
        resample_every_steps=max(1, steps // 10) if published else 0,
        normalise=not published,
        betas=(0.9, 0.999 if published else 0.99),
        precision="fp32",
        seed=seed,
    )
    trainer.calibrate(data.train_RD[: min(50_000, rows)])
    for batch in data.train_RD[: steps * options.batch].split(options.batch):
        trainer.step(batch)
    return trainer.sae()


class Peer:
    """A worker in the peer's own environment."""

    def __init__(self, name: str, python: str, folder: Path) -> None:
        self.name, self.folder, self.jobs = name, folder, 0
        command = [python, str(Path(__file__).with_name("quality_peers.py")), name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def train(self, rows: Path, lr: float | None, seed: int, options: argparse.Namespace) -> TopKSAE:
        self.jobs += 1
        out = self.folder / f"{self.name}-{self.jobs}.pt"
        job = {"rows": str(rows), "dict_size": options.dict_size, "k": options.k, "lr": lr, "batch": options.batch}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(
            json.dumps(job | {"seed": derive_seed(seed, self.name) % 2**31, "out": str(out)}), file=self.process.stdin
        )
        self.process.stdin.flush()
        for line in self.process.stdout:  # peers print lines of their own
            if line.startswith('{"out"'):
                return self._load(out, options)
        raise SystemExit(f"{self.name}: the worker died; its error stands above")

    def _load(self, path: Path, options: argparse.Namespace) -> TopKSAE:
        weights = torch.load(path, weights_only=True)
        sae = TopKSAE(len(weights["pre_bias"]), options.dict_size, options.k, seed=0)
        with torch.no_grad():
            sae.encoder.weight.copy_(weights["encoder"])
            sae.encoder.bias.copy_(weights["encoder_bias"])
            sae.decoder.weight.copy_(weights["decoder"].T)
            sae.pre_bias.copy_(weights["pre_bias"])
        return sae


@torch.no_grad()
def figures(data: Data, sae: TopKSAE) -> Figures:
    """Held-out fidelity, and recovery where features are known."""
    fidelity = Fidelity(sae.hidden_dim, sae.dict_size, ("row",))
    for x_BD in data.held_out_RD.split(8192):
        codes, none = sae.encode(x_BD), torch.zeros(len(x_BD))
        fidelity.update(x_BD, codes, sae.decode(codes), none, none.bool())
    found = fidelity.figures()
    kept = {key: float(found[key]) for key in ("fvu", "explained_variance", "dead_fraction")}
    return kept | (recovery(data.truth, sae, rows=8192, seed=9005) if data.truth else {})


def summary(runs: list[tuple[Figures, TopKSAE]]) -> Figures:
    """Means over seeds, the spread of FVU, and agreement between the first two seeds."""
    values = [run for run, _ in runs]
    found = {key: mean(run[key] for run in values) for key in values[0]}
    found["fvu_spread"] = max(run["fvu"] for run in values) - min(run["fvu"] for run in values)
    if len(runs) > 1:
        found["stable"] = cross_seed_stability(runs[0][1], runs[1][1])["stable"]
    return found


def compare(data: Data, peers: list[Peer], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every trainer on one set of rows."""
    rows = folder / "rows.pt"
    torch.save(data.train_RD, rows)
    trainers: dict[str, Callable[[float | None, int], TopKSAE]] = {
        name: lambda lr, seed, name=name: train_ours(data, name, lr, seed, options)
        for name in (*OURS, *(("truth",) if data.truth else ()))
    }
    trainers |= {peer.name: lambda lr, seed, peer=peer: peer.train(rows, lr, seed, options) for peer in peers}
    result: dict[str, Any] = {}
    for name, train in trainers.items():

        def measured(lr: float | None, train: Callable[[float | None, int], TopKSAE] = train) -> Figures:
            saes = [train(lr, seed) for seed in range(options.seeds)]
            return summary([(figures(data, sae), sae) for sae in saes])

        grid = {str(lr): measured(lr) for lr in GRID}
        best = min(grid, key=lambda lr: grid[lr]["fvu"])
        result[name] = {"tuned": {"lr": float(best)} | grid[best], "default": measured(None), "grid": grid}
        print(f"{data.name}: {name}: tuned {result[name]['tuned']}, default {result[name]['default']}", file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("synthetic", "standin"), default="synthetic")
    parser.add_argument("--kind", action="append", choices=("sparse", "correlated", "hierarchical"))
    parser.add_argument("--layer", action="append", type=int)
    parser.add_argument("--rows", type=int, default=327_680)
    parser.add_argument("--dim", type=int, default=128, help="of synthetic rows")
    parser.add_argument("--features", type=int, default=512, help="known features of synthetic rows")
    parser.add_argument("--dict-size", type=int, default=512)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--our-lr", type=float, default=4e-3, help="the normalised recipe's default at this size")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    options.kind, options.layer = options.kind or ["sparse"], options.layer or [6, 22, 35]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="quality-") as name:
        folder = Path(name)
        peers = [Peer(*peer.split("=", 1), folder) for peer in options.peer]
        source = synthetic if options.data == "synthetic" else standin
        results = {data.name: compare(data, peers, folder, options) for data in source(options)}
        for peer in peers:
            peer.process.communicate()
    settings = {key: value for key, value in vars(options).items() if key not in ("peer", "json")}
    text = json.dumps({"settings": settings, "grid": GRID, "results": results}, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
