"""Compare the quality of SAEs: our recipes and the peers', on the same rows, seeds and learning-rate grid.

    python bench/quality.py runs/quality --peer saelens=ENV/bin/python \
        --peer dictionary_learning=ENV/bin/python --peer sparsify=ENV/bin/python --peer sparsify_adam=ENV/bin/python
    python bench/quality.py runs/quality-standin --recipe standin --site layers.6 --site layers.22 --peer ...

Every trainer sees each row once, in the same order, and is seeded apart from the data. `tuned` is the grid's learning
rate with the lowest held-out FVU under the first seed, then trained under every seed; `default` are the trainer's own
settings; quote both. Ours are the published recipe (card: raw rows, resampling), its learning rates matched to this
budget by lr x sqrt(d) x steps, and the normalised recipe (with --recipe, that recipe's own settings). `truth` starts at
the known features and trains with ours: what better optimisation could reach. `--ours` changes settings of ours (and of
`truth`) by their names in `SAETrainer`: --ours initial_decoder=random --ours 'prefixes=[64, 128]'. Rows of a model and
each trained SAE are kept in the folder given, so an interrupted comparison goes on where it stopped and a trainer is
measured again by removing its runs; docs/quality.md reads the JSON as tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from quality_data import KINDS, MASSIVE, SYNTH_SAE_BENCH, Data, Splicer, model_rows, synthetic
from quality_table import markdown
from truth import cross_seed_stability, recovery

from qwenscope.evaluation.fidelity import Fidelity
from qwenscope.files import read_json, write_json
from qwenscope.lm.sites import Site
from qwenscope.recipe import load_recipe
from qwenscope.sae.sae import TopKSAE
from qwenscope.seeds import derive_seed
from qwenscope.training.trainer import SAETrainer

GRID = (4e-4, 1.2e-3, 4e-3, 1.2e-2)
CARD_DIM, CARD_STEPS, CARD_LAYER = 2048, 48_828, 22  # the published suite; its middle layer stands for any other rows
DEFAULT = "default"
OUR_LR = 8e-3  # of the normalised recipe at these widths and budgets; docs/experiments.md, as for `recipe_settings`
OUR_KEYS = (
    "normalise",
    "initial_decoder",
    "decay_share",
    "aux_coefficient",
    "aux_k",
    "betas",
    "eps",
    "cautious",
    "clip_norm",
)
Figures = dict[str, float]
Trained = tuple[TopKSAE, float]
"""An SAE and the CPU seconds of its training alone."""


def card_rate(data: Data, steps: int) -> float:
    """The published learning rate of this layer, matched to this width and budget."""
    points = load_recipe("qwen3.5-35b-a3b").hook_points.values()
    rates = {point.layer: point.lr for point in points}
    published = rates.get(CARD_LAYER if data.site is None else data.site.layer, rates[CARD_LAYER])
    return published * (CARD_DIM / data.train_RD.shape[1]) ** 0.5 * CARD_STEPS / steps


def our_rate(data: Data) -> float:
    """The recipe's own learning rate at this site, where the rows come from one of its hook points."""
    rates = {} if data.recipe is None else {point.site: point.lr for point in data.recipe.hook_points.values()}
    return rates.get(None if data.site is None else data.site.name, OUR_LR)


def recipe_settings(name: str, data: Data, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """How the published recipe, the rows' own and the normalised one differ from the trainer's defaults."""
    if name == "published":
        return {"resample_every_steps": max(1, steps // 10)}
    if data.recipe is not None:
        own = {key: getattr(data.recipe.training, key) for key in OUR_KEYS}
    else:
        own = {"normalise": True, "betas": (0.9, 0.95), "decay_share": 0.4, "aux_k": options.k}
    own |= options.ours
    return own | ({"initial_decoder": "random"} if name == "truth" else {})


def train_ours(data: Data, name: str, lr: float | None, seed: int, options: argparse.Namespace) -> Trained:
    """The published recipe or the normalised one (`truth` is the latter from the known features on)."""
    dim, rows = data.train_RD.shape[1], len(data.train_RD)
    steps = rows // options.batch
    if lr is None:
        lr = card_rate(data, steps) if name == "published" else our_rate(data)
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
        precision="fp32",
        seed=seed,
        **recipe_settings(name, data, steps, options),
    )
    started = time.process_time()
    trainer.calibrate(data.train_RD[: min(50_000, rows)])
    for batch in data.train_RD[: steps * options.batch].split(options.batch):
        trainer.step(batch)
    return trainer.sae(), time.process_time() - started


class Peer:
    """A worker in the peer's own environment, started when first needed."""

    def __init__(self, name: str, python: str) -> None:
        self.name = name
        # -E, -P: nothing of PYTHONPATH and no file beside it stands in for a package of the peer's.
        self.command = [python, "-E", "-P", str(Path(__file__).with_name("quality_peers.py")), name]
        self.process: subprocess.Popen[str] | None = None

    def train(self, rows: Path, out: Path, lr: float | None, seed: int, options: argparse.Namespace) -> Trained:
        """Train on the rows in a file; `out` takes the worker's weights for the moment."""
        if self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        job = {"rows": str(rows), "dict_size": options.dict_size, "k": options.k, "lr": lr, "batch": options.batch}
        job |= {"seed": derive_seed(seed, self.name) % 2**31, "out": str(out)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        for line in self.process.stdout:  # peers print lines of their own
            if line.startswith('{"out"'):
                return self._load(out, options), float(json.loads(line)["cpu_seconds"])
        raise SystemExit(f"{self.name}: the worker died; its error stands above")

    def _load(self, path: Path, options: argparse.Namespace) -> TopKSAE:
        weights = torch.load(path, weights_only=True)
        path.unlink()
        sae = TopKSAE(len(weights["pre_bias"]), options.dict_size, options.k, seed=0)
        with torch.no_grad():
            sae.encoder.weight.copy_(weights["encoder"])
            sae.encoder.bias.copy_(weights["encoder_bias"])
            sae.decoder.weight.copy_(weights["decoder"].T)
            sae.pre_bias.copy_(weights["pre_bias"])
        return sae

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


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


Train = Callable[[float | None, int], Trained]


class Runs:
    """One trainer's SAEs on one set of rows, each trained once and kept in a folder of its own."""

    def __init__(self, folder: Path, data: Data, train: Train, options: argparse.Namespace) -> None:
        self.folder, self.data, self.train = folder, data, train
        self.seeds, self.rates = options.seeds, options.rate
        self.defaults = not options.tuned_only and folder.name != "truth"

    def place(self, rate: float | str, seed: int) -> Path:
        return self.folder / f"{rate}-{seed}"

    def figures(self, rate: float | str, seed: int) -> Figures:
        """Figures of one run, trained now if it never was."""
        place = self.place(rate, seed)
        if not (place / "figures.json").is_file():
            sae, cpu_seconds = self.train(None if isinstance(rate, str) else rate, seed)
            sae.save(place)
            found = figures(self.data, sae) | {"cpu_seconds": cpu_seconds}
            write_json(place / "figures.json", found)
            print(f"{place}: fvu {found['fvu']:.4f}, {cpu_seconds:.0f} CPU s", file=sys.stderr, flush=True)
        return {str(key): float(value) for key, value in read_json(place / "figures.json").items()}

    def best_rate(self) -> float:
        """The grid's rate with the lowest FVU under the first seed."""
        return min(self.rates, key=lambda lr: self.figures(lr, 0)["fvu"])

    def final(self) -> list[Path]:
        """Folders of the SAEs that are reported: every seed at the best rate and, where asked, at the default."""
        rates: list[float | str] = [self.best_rate(), *([DEFAULT] if self.defaults else [])]
        places = [(rate, seed) for rate in rates for seed in range(self.seeds)]
        for rate, seed in places:
            self.figures(rate, seed)
        return [self.place(rate, seed) for rate, seed in places]

    def summary(self, rate: float | str) -> Figures:
        """Means over seeds, the spread of FVU, and the mean over pairs of seeds of how many latents they share."""
        places = [self.place(rate, seed) for seed in range(self.seeds)]
        values = [read_json(place / "figures.json") | _spliced(place) for place in places]
        found = {key: mean(run[key] for run in values) for key in values[0]}
        for key in {"fvu", "ce_recovered_mean"} & found.keys():
            found[f"{key}_spread"] = max(run[key] for run in values) - min(run[key] for run in values)
        saes = [TopKSAE.from_pretrained(place) for place in places]
        pairs = [(a, b) for i, a in enumerate(saes) for b in saes[i + 1 :]]
        if pairs:
            found["stable"] = mean(cross_seed_stability(a, b)["stable"] for a, b in pairs)
        return found

    def result(self) -> dict[str, Any]:
        best = self.best_rate()
        found: dict[str, Any] = {"tuned": {"lr": best} | self.summary(best)}
        if self.defaults:
            found[DEFAULT] = self.summary(DEFAULT)
        return found | {"grid": {str(lr): self.figures(lr, 0)["fvu"] for lr in self.rates}}


def _spliced(place: Path) -> Figures:
    file = place / "spliced.json"
    return dict(read_json(file)) if file.is_file() else {}


def splice(places: list[Path], data: Data) -> None:
    """Measure the SAEs on a model's rows that were not spliced yet."""
    waiting = {str(place): place for place in places if not (place / "spliced.json").is_file()}
    if waiting and data.site is not None and data.recipe is not None:
        saes = {name: TopKSAE.from_pretrained(place) for name, place in waiting.items()}
        for name, found in Splicer(data.recipe)(saes, data.site).items():
            write_json(waiting[name] / "spliced.json", found)


def compare(data: Data, peers: Mapping[str, Peer], options: argparse.Namespace) -> dict[str, Any]:
    """Every asked trainer on one set of rows."""
    folder = options.folder / data.name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.pt"
    if not rows.is_file():
        torch.save(data.train_RD, rows)
    result: dict[str, Any] = {}
    places: list[Path] = []
    trainers: dict[str, Runs] = {}
    for name in options.trainer or ("published", *peers, "ours", *(("truth",) if data.truth else ())):

        def train(lr: float | None, seed: int, name: str = name) -> Trained:
            if name in peers:
                return peers[name].train(rows, folder / f"{name}.pt", lr, seed, options)
            return train_ours(data, name, lr, seed, options)

        trainers[name] = Runs(folder / name, data, train, options)
        places += trainers[name].final()
    splice(places, data)
    for name, runs in trainers.items():
        result[name] = runs.result()
    return result


def rows_of(options: argparse.Namespace) -> Iterator[Data]:
    """The sets of rows that were asked for, one after the other."""
    if options.recipe is None:
        kinds = options.kind or list(KINDS)
        return synthetic(options.rows, options.dim, options.features, options.k, kinds, options.held_out)
    recipe = load_recipe(options.recipe, options.set)
    sites = [Site(name) for name in options.site or recipe.sites]
    return model_rows(recipe, sites, options.rows, options.held_out, options.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps each trained SAE and quality.json; one budget per folder")
    parser.add_argument(
        "--kind",
        action="append",
        choices=(*KINDS, SYNTH_SAE_BENCH, MASSIVE),
        help="of synthetic rows; the first three by default",
    )
    parser.add_argument("--recipe", help="rows of this recipe's model and corpus instead of synthetic ones")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes the recipe")
    parser.add_argument("--site", action="append", help="of the model; the recipe's hook points by default")
    parser.add_argument("--rows", type=int, default=524_288)
    parser.add_argument("--held-out", type=int, default=32_768, help="held-out rows")
    parser.add_argument("--dim", type=int, default=128, help="of synthetic rows")
    parser.add_argument("--features", type=int, default=512, help="known features of synthetic rows")
    parser.add_argument("--dict-size", type=int, default=512)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", action="append", type=float, help=f"of the grid; {GRID} by default")
    parser.add_argument("--tuned-only", action="store_true", help="leave out the trainers' own settings")
    parser.add_argument("--trainer", action="append", help="only these: published, ours, truth or a peer's name")
    parser.add_argument("--ours", action="append", default=[], metavar="KEY=VALUE", help="a setting of ours")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.rate = options.rate or list(GRID)
    options.ours = {key: yaml.safe_load(value) for key, value in (each.split("=", 1) for each in options.ours)}
    budget = ("recipe", "set", "rows", "held_out", "dim", "features", "dict_size", "k", "batch", "ours")
    settings = {key: getattr(options, key) for key in budget}
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.folder / "settings.json"
    if kept.is_file() and read_json(kept) != settings:
        raise SystemExit(f"{options.folder} holds runs of another budget ({kept}); give another folder")
    write_json(kept, settings)
    peers = {name: Peer(name, python) for name, python in (peer.split("=", 1) for peer in options.peer)}
    results = {data.name: compare(data, peers, options) for data in rows_of(options)}
    for peer in peers.values():
        peer.close()
    write_json(options.folder / "quality.json", {"settings": settings, "grid": options.rate, "results": results})
    print(markdown(results))


if __name__ == "__main__":
    main()
