"""The model card: README.md of a release, written from measured numbers and the recipe, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from qwenscope.evaluation import plots, report
from qwenscope.evaluation.pairs import find_pairs
from qwenscope.evaluation.report import KIND_NAMES, SPLIT_NAMES
from qwenscope.lm.sites import Site
from qwenscope.release.facts import Facts, dataset_of
from qwenscope.sae.activation import TopK

COLUMNS = tuple(column for column in report.COLUMNS if column.key not in ("mse", "norm_ratio"))
TABLES = tuple(
    tuple(c for c in COLUMNS if (c in report.COLUMNS[: report.FIDELITY_COLUMNS]) == here) for here in (True, False)
)
"""Of fidelity, and of the effect on the language model: as wide as a page shows."""
_BLOCK = 4  # Qwen3.5: three Gated DeltaNet layers, then one of attention
_RESULTS = {
    "explained_variance": "explained variance",
    "l0": "L0",
    "dead_fraction": "dead latents",
    "ce_recovered_mean": "CE recovered (mean ablation)",
}
_NUMBER_WORDS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")


def model_card(facts: Facts) -> str:
    """The whole README.md, metadata first."""
    environment = Environment(
        loader=PackageLoader("qwenscope.release"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown; free text passes `plain`
    )
    environment.filters["plain"] = plain
    points = facts.recipe.hook_points
    return environment.get_template("card.md.j2").render(
        metadata=yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True, width=120),
        facts=facts,
        recipe=facts.recipe,
        training=facts.recipe.training,
        inner=reads_inside(facts),
        activations=activations(facts),
        suite=facts.suite,
        model=facts.suite["language_model"]["name"],
        repo=facts.suite["repo"] or ".",
        measured_on=measured_on(facts.evaluation),
        title=title(facts),
        count=_NUMBER_WORDS[len(points)] if len(points) < len(_NUMBER_WORDS) else str(len(points)),
        example=example_sae(facts),
        blocks=in_blocks(facts),
        block=_BLOCK,
        kinds=KIND_NAMES,
        metrics=list(metrics_tables(facts)),
        probed=probed(facts),
        differences=list(differences(facts)),
        sources=list(sources(facts)),
        hardware=hardware(facts.run),
    )


def example_sae(facts: Facts) -> str:
    """The SAE that usage examples load: of the attention layers (or of all, if none is hooked) the middle one."""
    points = facts.recipe.hook_points
    candidates = [sae_id for sae_id, point in points.items() if point.kind == "attention"] or list(points)
    return sorted(candidates, key=lambda sae_id: points[sae_id].layer)[len(candidates) // 2]


def measured_on(evaluation: Mapping[str, Any]) -> str:
    """What the figures were measured on, in words."""
    origin = evaluation.get("data", {}).get("origin", "")
    return f"the conversations of {plain(origin)}" if origin and "held out" not in origin else "held-out conversations"


def title(facts: Facts) -> str:
    """Heading of the card: the repository's name, or what it is."""
    repo = facts.suite["repo"]
    kind = "TopK SAEs" if activations(facts) == [TopK.name] else "SAEs"
    return str(repo).rsplit("/", 1)[-1] if repo else f"{kind} for {facts.suite['language_model']['name']}"


def activations(facts: Facts) -> list[str]:
    """Names of the activations of the suite's SAEs, each once."""
    return list(dict.fromkeys(point.activation for point in facts.recipe.hook_points.values()))


def reads_inside(facts: Facts) -> bool:
    """Whether an SAE reads elsewhere than at the residual stream."""
    return any(Site(point.site).within for point in facts.recipe.hook_points.values())


def metadata(facts: Facts) -> dict[str, Any]:
    """The card's YAML front matter, as the Hub reads it."""
    model = facts.suite["language_model"]["name"]
    tags = ["sparse-autoencoder", "sae", *(name.replace("_", "-") for name in activations(facts))]
    tags += ["interpretability", "mechanistic-interpretability"]
    inside = reads_inside(facts)
    found: dict[str, Any] = {"license": "mit", "library_name": "qwenscope", "pipeline_tag": "feature-extraction"}
    if model.count("/") == 1:
        found["base_model"] = model
    if facts.datasets:
        found["datasets"] = facts.datasets
    hybrid = {point.kind for point in facts.recipe.hook_points.values()} >= set(KIND_NAMES)
    found["tags"] = [
        *tags,
        *([] if inside else ["residual-stream"]),
        *(["gated-deltanet", "hybrid-attention"] if hybrid else []),
        "saelens",
    ]
    task = {"type": "feature-extraction", "name": f"{'Activation' if inside else 'Residual-stream'} reconstruction"}
    on = measured_on(facts.evaluation)
    results = [
        {
            "task": task,
            "dataset": {"type": "conversations", "name": f"{SPLIT_NAMES.get(split, split)}, {on}", "split": split},
            "metrics": [
                {"type": key, "value": round(cell[key], 6), "name": f"{sae_id}: {name}"}
                for sae_id, splits in facts.evaluation["saes"].items()
                if (cell := splits.get(split))
                for key, name in _RESULTS.items()
            ],
        }
        for split in facts.splits
    ]
    found["model-index"] = [{"name": title(facts), "results": results}]
    return found


def in_blocks(facts: Facts) -> bool:
    """Whether the hooked layers fit blocks of three DeltaNet layers and one of attention."""
    return all(
        point.kind is not None and (point.kind == "attention") == (point.layer % _BLOCK == _BLOCK - 1)
        for point in facts.recipe.hook_points.values()
    )


Rows = list[tuple[str, list[str]]]
"""(SAE id, formatted numbers)."""


def metrics_tables(facts: Facts) -> Iterator[tuple[str, int, list[tuple[list[str], Rows]]]]:
    """(split's name, most tokens measured, (headings, rows) of each table) per split."""
    for split in facts.splits:
        cells = {sae_id: facts.evaluation["saes"][sae_id].get(split) for sae_id in facts.recipe.hook_points}
        measured = {sae_id: cell for sae_id, cell in cells.items() if cell}
        tables = [
            (
                [column.heading for column in columns],
                [
                    (sae_id, [_shown(cell[each.key], each.form) for each in columns])
                    for sae_id, cell in measured.items()
                ],
            )
            for columns in TABLES
        ]
        yield SPLIT_NAMES.get(split, split), max(cell["tokens"] for cell in measured.values()), tables


def probed(facts: Facts) -> list[tuple[str, list[str]]]:
    """Per SAE the AUROC of 1, 4 and 16 latents, of a frozen decoder's, and of all dimensions; shares absorbed, of its
    latents and of a frozen decoder's; |mean| / std. Empty if not measured."""
    saes = facts.evaluation.get("usefulness", {}).get("saes", {})
    columns = [(name, k) for name in ("latents", "frozen decoder") for k in ("1", "4", "16")] + [("rows", "all")]
    return [
        (
            sae_id,
            [
                *(f"{saes[sae_id]['probing'][name][k]['auroc']:.3f}" for name, k in columns),
                *(report.number(share, ".1%") for share in report.absorbed(saes[sae_id])),
                report.number(saes[sae_id].get("mean_over_std"), ".2f"),
            ],
        )
        for sae_id in (facts.recipe.hook_points if saes else ())
    ]


def quality_plots(facts: Facts) -> str:
    """quality.svg: FVU, CE recovered and KL by depth, a column for each split."""
    points = {
        sae_id: {**Site(point.site).described(), "kind": point.kind}
        for sae_id, point in facts.recipe.hook_points.items()
    }
    return plots.sheet(report.depth_plots(facts.evaluation, points, facts.splits), len(facts.splits))


def _shown(value: float | None, form: str) -> str:
    return "none seen" if value is None else format(value, form)


def differences(facts: Facts) -> Iterator[dict[str, Any]]:
    """One row per neighbouring pair and split: FVU and CE recovered of both, differences with intervals if measured."""
    measured = facts.evaluation.get("comparison", {}).get("splits", {})
    for pair in find_pairs(facts.recipe.hook_points):
        for split in facts.splits:
            cells = [facts.evaluation["saes"][sae_id].get(split) for sae_id in (pair.first, pair.second)]
            if all(cells):
                intervals = measured.get(split, {}).get("differences", {}).get(f"{pair.first} -> {pair.second}", {})
                yield {
                    "pair": f"{pair.first} → {pair.second}",
                    "what": "attention − DeltaNet" if pair.kind == "matched" else "position control",
                    "split": SPLIT_NAMES.get(split, split),
                    "cells": [_difference(cells, intervals, key) for key in ("fvu", "ce_recovered_mean", "kl")],
                }


def _difference(cells: Sequence[Mapping[str, Any]], intervals: Mapping[str, Any], key: str) -> str:
    low_high = intervals.get(key, {}).get("interval")
    text = f"{cells[1][key] - cells[0][key]:+.4f}"
    return f"{text} [{low_high[0]:+.4f}, {low_high[1]:+.4f}]" if low_high else text


def sources(facts: Facts) -> Iterator[dict[str, Any]]:
    """One row per corpus source: where from, the first twelve digits of its revision (run.json has them all), and the
    report's counts if there is a report."""
    revisions = facts.run.get("revisions", {}).get("corpus", {})
    total = sum(source.weight for source in facts.recipe.corpus.sources)
    reported = (facts.privacy or {}).get("sources", {})
    ids = list(reported) if len(reported) == len(facts.recipe.corpus.sources) else []
    for number, source in enumerate(facts.recipe.corpus.sources):
        name = ids[number] if ids else source.name
        generated = "packaged generator" if source.generated else "local files"
        kind, colon, digits = str(source.revision or revisions.get(name) or "").rpartition(":")
        yield {
            "id": name,
            "origin": dataset_of(source) or generated,
            "revision": f"{kind}{colon}{digits[:12]}",
            "weight": source.weight / total,
            "report": reported.get(name),
        }


def hardware(run: Mapping[str, Any]) -> str:
    """One line: devices, or the CPU; empty where the run did not record it."""
    machine = run.get("machine", {})
    if machine.get("devices"):
        names = [f"{device['name']} ({device['memory_bytes'] / 2**30:.0f} GiB)" for device in machine["devices"]]
        return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    cpu = machine.get("cpu")
    return f"CPU, {cpu['cores']} cores, torch threads: {cpu['torch_threads']}" if cpu else ""


def plain(text: object) -> str:
    """Free text for one Markdown cell: no table breaks, no HTML, no line breaks."""
    cleaned = " ".join(str(text).split())
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("`", "&#96;"), ("[", "&#91;")):
        cleaned = cleaned.replace(sign, entity)
    return cleaned
