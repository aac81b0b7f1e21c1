"""How a suite would scale over GPUs: a simulation from `qwenscope plan`'s roofline. Nothing here was measured on them.

    python bench/scaling.py [--recipe qwen3.5-35b-a3b] [--gpu h200] [--gpus 1 8 64 512] [--json FILE]

Prints one JSON object: for each suite and number of GPUs the tokens per second [cautious, optimistic], the hours for
the recipe's tokens and for 10 billion, the share of linear scaling, what bounds the run (the language model's share,
the busiest owner's SAE steps, or the rows' way to it), and the bytes that all ranks send per training step.
`--markdown` prints docs/scaling.md's table instead.

Two suites: the recipe's own, and one SAE after every layer. A window grows with the number of GPUs, as `plan` advises,
so that each finds batches to harvest; `--window-tokens` caps it, since one owner holds it whole.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qwenscope.planning.memory import feeding
from qwenscope.planning.plan import plan, read_config
from qwenscope.recipe import HookPoint, Recipe, load_recipe

TEN_BILLION = 10_000_000_000
PARTS = {"language model": "language_model", "busiest owner": "saes_of_busiest_card", "rows": "exchange"}


def every_layer(recipe: Recipe) -> Recipe:
    """The recipe with one SAE of 16384 latents, k 64, after each layer of its model."""
    layers = read_config(recipe).num_hidden_layers
    points = {f"sae_{layer:02}": HookPoint(layer=layer, dict_size=16384, k=64, lr=1e-5) for layer in range(layers)}
    return recipe.model_copy(update={"hook_points": points})


def row(recipe: Recipe, gpu: str, gpus: int, most: int) -> dict[str, Any]:
    """One line of the table; lists are [cautious, optimistic]."""
    recipe = feeding(recipe, gpus, most)
    one = plan(recipe, gpu, 1)
    many = plan(recipe, gpu, gpus)
    long = plan(recipe, gpu, gpus, TEN_BILLION)
    seconds = many["seconds_per_step"]
    shares = {name: seconds[key][0] / (gpus if key == "language_model" else 1) for name, key in PARTS.items()}
    return {
        "gpus": gpus,
        "window_tokens": recipe.activations.window_tokens,
        "tokens_per_second": many["tokens_per_second"],
        "of_linear": [
            round(now / (gpus * alone), 3)
            for now, alone in zip(many["tokens_per_second"], one["tokens_per_second"], strict=True)
        ],
        "hours": many["hours"][::-1],
        "hours_10B": long["hours"][::-1],
        "bound": max(shares, key=lambda name: shares[name]),
        "megabytes_per_step": round(many["bytes_per_step"] / 1e6, 1),
        "fits": many["fits"],
    }


def table(suites: dict[str, list[dict[str, Any]]]) -> str:
    """The same, as the page shows it."""
    heads = ("suite", "GPUs", "window", "thousand tokens/s", "of linear", "hours, recipe", "hours, 10B")
    heads += ("bound by", "MB per step", "fits")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]

    def span(values: list[float]) -> str:
        return " - ".join(f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in values)

    for name, rows in suites.items():
        for line in rows:
            cells = [
                name,
                f"{line['gpus']}",
                f"{line['window_tokens']:,}",
                span([value / 1000 for value in line["tokens_per_second"]]),
                span([100 * value for value in line["of_linear"]]) + " %",
                span(line["hours"]),
                span(line["hours_10B"]),
                line["bound"],
                f"{line['megabytes_per_step']:,.0f}",
                "yes" if line["fits"] else "no",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="qwen3.5-35b-a3b")
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 512])
    parser.add_argument("--window-tokens", type=int, default=4_194_304, help="largest window")
    parser.add_argument("--json", type=Path, help="write there as well")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    own = load_recipe(options.recipe)
    suites = {
        name: [row(recipe, options.gpu, gpus, options.window_tokens) for gpus in options.gpus]
        for name, recipe in {options.recipe: own, "one SAE per layer": every_layer(own)}.items()
    }
    result = {"simulated": True, "gpu": options.gpu, "suites": suites}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(suites) if options.markdown else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
