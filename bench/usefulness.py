"""What training adds to usefulness, hook by hook: a table out of `evaluation.json` files that hold `usefulness`.

    python bench/usefulness.py --recipe standin > three.yaml
    qwenscope train three.yaml --out runs/three
    qwenscope evaluate runs/three --probing
    python bench/usefulness.py runs/three/evaluation.json [more runs' files]

`--recipe` prints a recipe in which every hook point stands three times: a trainer's seed depends on its id, and all
read the same rows. SAEs of one site and size, in one file or several, are taken for one SAE under several seeds. Each
score is that of the trained SAE less that of the one whose decoder stayed random, in units of the standard deviation
under reseeding: of training (over the SAEs), and of the division of the conversations with the frozen decoder drawn for
it (over the evaluation's seeds), added as variances. Absorption counts downwards: above 0 means that training has less.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance
from typing import Any

from qwenscope.files import read_object
from qwenscope.recipe import Recipe, load_recipe

SEEDS = 3

Figures = Mapping[str, Any]
"""`usefulness.saes` of one SAE."""


@dataclass(frozen=True)
class Score:
    """One score of the SAEs at one site: means over all seeds, and trained better than frozen by so many deviations."""

    trained: float
    frozen: float
    deviations: float

    def __str__(self) -> str:
        return f"{self.trained:.3f} / {self.frozen:.3f}, {self.deviations:+.1f}"


def sites(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, list[Figures]]:
    """{site and size: figures of each SAE there}, in the order of the files."""
    found: dict[str, list[Figures]] = {}
    for evaluation in evaluations:
        for sae_id, figures in evaluation["usefulness"]["saes"].items():
            point = evaluation["hook_points"][sae_id]
            site = point.get("site", f"layers.{point['layer']}")
            found.setdefault(f"{site}, n {point['dict_size']}, k {point['k']}", []).append(figures)
    return found


def probing(saes: Sequence[Figures], latents: str, family: str | None = None) -> Score:
    """AUROC of probes on so many latents, of one family of labels or of their mean."""
    cells = [{name: one["probing"][name][latents] for name in ("latents", "frozen decoder")} for one in saes]
    if family is not None:
        cells = [{name: cell["families"][family] for name, cell in each.items()} for each in cells]
        paired = None
    else:
        paired = [one["above_frozen_decoder"][latents]["std"] for one in saes]
    return _score(cells, "auroc", paired, 1)


def absorption(saes: Sequence[Figures]) -> Score:
    """The share of rows whose label another latent took in."""
    return _score(
        [{name: one["absorption"][name]["absorbed"] for name in ("latents", "frozen decoder")} for one in saes],
        "share",
        None,
        -1,
    )


def _score(cells: Sequence[Mapping[str, Figures]], key: str, paired: Sequence[float] | None, sign: int) -> Score:
    """`paired`: deviation of each SAE's difference over the evaluation's seeds; without it both sides' count alone."""
    trained, frozen = ([cell[name][key] for cell in cells] for name in ("latents", "frozen decoder"))
    if paired is None:
        paired = [(cell["latents"]["std"] ** 2 + cell["frozen decoder"]["std"] ** 2) ** 0.5 for cell in cells]
    spread = (variance(trained) + mean(std**2 for std in paired)) ** 0.5
    above = sign * (mean(trained) - mean(frozen))
    return Score(mean(trained), mean(frozen), above / max(spread, 1e-12))


def table(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """One line per site: trained / frozen, deviations above, for 1, 4 and 16 latents and absorption; dense latents."""
    lines = ["| site | 1 latent | 4 | 16 | absorbed | dense latents |", "|---|---|---|---|---|---|"]
    for name, saes in sites(evaluations).items():
        scores = [*(probing(saes, latents) for latents in ("1", "4", "16")), absorption(saes)]
        dense = mean(one["dense_latents"] for one in saes)
        lines.append(f"| {name} | {' | '.join(map(str, scores))} | {dense:.0f} |")
    return "\n".join(lines)


def by_family(evaluations: Sequence[Mapping[str, Any]], latents: str) -> str:
    """One line per site: the same for each family of labels."""
    found = sites(evaluations)
    families = list(next(iter(found.values()))[0]["probing"]["latents"][latents]["families"])
    lines = [f"| {latents} latents | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
    for name, saes in found.items():
        lines.append(f"| {name} | {' | '.join(str(probing(saes, latents, family)) for family in families)} |")
    return "\n".join(lines)


def reseeded(recipe: Recipe) -> Recipe:
    """The recipe with every hook point SEEDS times, under ids of their own."""
    points = {f"{id}_{seed}": point for id, point in recipe.hook_points.items() for seed in range(SEEDS)}
    return recipe.model_copy(update={"hook_points": points})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, nargs="*", help="evaluation.json")
    parser.add_argument("--recipe", help="print this recipe for several seeds instead")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes the recipe")
    options = parser.parse_args()
    if options.recipe is not None:
        print(reseeded(load_recipe(options.recipe, options.set)).to_yaml())
        return
    evaluations = [read_object(path) for path in options.evaluation]
    print(table(evaluations), *(by_family(evaluations, latents) for latents in ("1", "4")), sep="\n\n")


if __name__ == "__main__":
    main()
