"""The evaluation as a page: report.html, one file that loads nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qwenscope.evaluation import plots

CURVE_POINTS = 200  # of a training curve in the page
Groups = Sequence[Sequence[str]]

SPLIT_NAMES = {"chat": "chat", "tool_use": "tool use", "text": "text"}
KIND_NAMES = {"deltanet": "DeltaNet", "attention": "attention"}


@dataclass(frozen=True)
class Column:
    """One column of the main tables: key in evaluation.json, heading, format, explanation on hover."""

    key: str
    heading: str
    form: str
    meaning: str


COLUMNS = (
    Column("fvu", "FVU", ".4f", "Fraction of variance unexplained: squared residuals over deviations from the mean"),
    Column("explained_variance", "EV", ".4f", "Explained variance, 1 - FVU, over all dimensions together"),
    Column("explained_variance_per_dim", "EV per dim", ".4f", "Mean over dimensions of each one's explained variance"),
    Column("mse", "MSE", ".3g", "Mean squared residual per token and dimension"),
    Column("mse_special_tokens", "MSE special", ".3g", "The same on the tokenizer's added (control) tokens"),
    Column("cosine", "cosine", ".4f", "Mean cosine of row and reconstruction"),
    Column("norm_ratio", "norm ratio", ".4f", "Mean of reconstruction norm over row norm"),
    Column("l0", "L0", ".1f", "Latents above 0 per token"),
    Column("dead_fraction", "dead", ".2%", "Latents that never fired on this split's tokens"),
    Column("ce_clean", "CE clean", ".4f", "Next-token cross-entropy of the model, nats"),
    Column("ce_spliced", "CE spliced", ".4f", "The same with the SAE's reconstruction in place of the stream"),
    Column("ce_recovered_zero", "CE rec. zero", ".4f", "Share of zero ablation's harm avoided; never clipped"),
    Column("ce_recovered_mean", "CE rec. mean", ".4f", "Share of mean ablation's harm avoided; never clipped"),
    Column("kl", "KL", ".4f", "Divergence from the clean to the spliced next-token distribution, nats"),
)  # fmt: skip
FIDELITY_COLUMNS = 9  # of them compare activations, the rest the model's predictions
DIFFERENCES = (
    ("fvu", "FVU, attention minus DeltaNet"),
    ("ce_increase", "CE increase in nats, attention minus DeltaNet"),
    ("ce_recovered_mean", "CE recovered (mean ablation), attention minus DeltaNet"),
    ("kl", "KL in nats, attention minus DeltaNet"),
)


def report_html(evaluation: Mapping[str, Any], folder: Path) -> str:
    """The whole page; training curves come from `metrics.jsonl` in `folder`, if it is there."""
    environment = Environment(
        loader=PackageLoader("qwenscope.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    splits = list(evaluation["data"]["splits"])
    groups = neighbours(evaluation["hook_points"])
    return environment.get_template("report.html.j2").render(
        evaluation=evaluation,
        splits=splits,
        split_names=SPLIT_NAMES,
        kind_names=KIND_NAMES,
        tables={"Fidelity": COLUMNS[:FIDELITY_COLUMNS], "Effect on the language model": COLUMNS[FIDELITY_COLUMNS:]},
        columns=COLUMNS,
        number=number,
        noise=noise,
        place=place,
        headlines=headlines(evaluation),
        depth_plots=depth_plots(evaluation, evaluation["hook_points"], splits),
        difference_plots=difference_plots(evaluation),
        density_plots=density_plots(evaluation, groups),
        routing_plots=downstream_plots(evaluation, "routing", "overlap", groups),
        state_plots=downstream_plots(evaluation, "recurrent_state", "shift", groups, include=(0.0,)),
        curve_plots=curve_plots(evaluation, groups, folder / "metrics.jsonl"),
        roles=list(dict.fromkeys(role for cell in _cells(evaluation) for role in cell["roles"])),
    )


def number(value: float | None, form: str) -> str:
    """A formatted number, or a dash where it does not exist."""
    return "–" if value is None else format(value, form)


def noise(cell: Mapping[str, Any]) -> str:
    """The standard deviation of a figure over seeds and its interval over conversations, for hovering."""
    if cell.get("std") is None:
        return ""
    low, high = cell.get("interval") or (None, None)
    return f"± {cell['std']:.3f}, {number(low, '.3f')} to {number(high, '.3f')}"


def absorbed(figures: Mapping[str, Any]) -> list[float | None]:
    """Shares absorbed in one SAE's usefulness: of its latents and of a frozen decoder's; None where there is none."""
    found = figures.get("absorption", {})
    return [found.get(name, {}).get("absorbed", {}).get("share") for name in ("latents", "frozen decoder")]


def place(point: Mapping[str, Any]) -> str:
    """Where a hook point reads: 22 for the residual stream after layer 22, 22.mlp or 22.mixer inside it.

    Of a transcoder also where it predicts: 22.mlp_in → 22.mlp_out.
    """
    where = str(point.get("site", point["layer"])).removeprefix("layers.")
    return f"{where} → {point['target'].removeprefix('layers.')}" if "target" in point else where


def neighbours(hook_points: Mapping[str, Mapping[str, Any]], most: int = 4) -> list[list[str]]:
    """Hook points in order of depth, grouped where layers follow each other, at most `most` to a group."""
    ordered = sorted(hook_points, key=lambda sae_id: hook_points[sae_id]["layer"])
    layer_minus_rank = {sae_id: hook_points[sae_id]["layer"] - rank for rank, sae_id in enumerate(ordered)}
    groups = []
    for _, run in groupby(ordered, key=layer_minus_rank.__getitem__):
        members = list(run)
        groups += [members[start : start + most] for start in range(0, len(members), most)]
    return groups


def headlines(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(value, name, range) of the few numbers that a reader wants first; medians over SAEs and splits."""
    cells = _cells(evaluation)
    rows = []
    for key, name, form in (
        ("explained_variance", "explained variance", ".1%"),
        ("ce_recovered_mean", "CE recovered (mean ablation)", ".1%"),
        ("kl", "KL to the clean model, nats", ".3f"),
    ):
        values = sorted(cell[key] for cell in cells if cell[key] is not None)
        if not values:
            continue
        span = f"{format(values[0], form)} to {format(values[-1], form)}"
        rows.append((format(values[len(values) // 2], form), name, span))
    dead = sorted(entry["dead_fraction"] for entry in evaluation["dead"].values())
    rows.append((f"{dead[len(dead) // 2]:.1%}", "dead latents (on all splits)", f"{dead[0]:.1%} to {dead[-1]:.1%}"))
    return rows


def depth_plots(
    evaluation: Mapping[str, Any], hook_points: Mapping[str, Mapping[str, Any]], splits: Sequence[str]
) -> list[Markup]:
    """FVU, CE recovered and KL by depth and kind, one figure per metric and split; splits share their scale."""
    found = evaluation.get("comparison", {}).get("splits", {})
    intervals = {split: found.get(split, {}).get("intervals", {}) for split in splits}
    figures = []
    for key, name, include in (
        ("fvu", "FVU", (0.0,)),
        ("ce_recovered_mean", "CE recovered against mean ablation", (1.0,)),
        ("kl", "KL from clean to spliced, nats", (0.0,)),
    ):
        values = {
            split: [
                plots.Dot(
                    x=point["layer"],
                    y=cell[key],
                    label=f"{sae_id}, layer {place(point)}",
                    style=_kind(point),
                    interval=intervals[split].get(sae_id, {}).get(key),
                )
                for sae_id, point in hook_points.items()
                if (cell := evaluation["saes"][sae_id].get(split)) and cell[key] is not None
            ]
            for split in splits
        }
        reach = [*include, *(end for dots in values.values() for dot in dots for end in dot.ends)]
        for split, dots in values.items():
            if dots:
                title = f"{name}, {SPLIT_NAMES.get(split, split)}"
                figures.append(plots.dots(title, dots, "layer", "", include=reach))
    return figures


def difference_plots(evaluation: Mapping[str, Any]) -> list[Markup]:
    """Attention minus DeltaNet at matched depths, and the position control below, with intervals; splits share their
    scale."""
    comparison = evaluation["comparison"]
    figures = []
    for metric, title in DIFFERENCES if comparison["pairs"] else ():
        by_split = {split: difference_rows(comparison, split, metric) for split in comparison["splits"]}
        reach = [end for rows in by_split.values() for row in rows for end in row.ends]
        for split, rows in by_split.items():
            if rows:
                figures.append(plots.forest(f"{title}, {SPLIT_NAMES.get(split, split)}", rows, "", include=reach))
    return figures


def difference_rows(comparison: Mapping[str, Any], split: str, metric: str) -> list[plots.Row]:
    """A row per pair that has the difference, matched pairs first."""
    rows = []
    for pair in sorted(comparison["pairs"], key=lambda pair: pair["kind"] != "matched"):
        cell = comparison["splits"][split]["differences"][f"{pair['first']} -> {pair['second']}"][metric]
        if cell["difference"] is None:
            continue
        below, above = pair["layers"]
        control = pair["kind"] != "matched"
        label = f"{'control ' if control else ''}{above} \N{MINUS SIGN} {below}"
        style = "control" if control else "attention" if cell["difference"] > 0 else "deltanet"
        rows.append(plots.Row(label, cell["difference"], style, cell["interval"]))
    return rows


def density_plots(evaluation: Mapping[str, Any], groups: Groups) -> dict[str, list[Markup]]:
    """Histograms of log10 firing frequency by split, neighbours together, from the rarest latent of all on; splits
    share their scale."""
    densities = [cell["density"] for cell in _cells(evaluation)]
    firsts = [next((bin for bin, count in enumerate(density["counts"]) if count), None) for density in densities]
    first = min((bin for bin in firsts if bin is not None), default=0)
    figures: dict[str, list[Markup]] = {split: [] for split in evaluation["data"]["splits"]}

    def histogram(sae_id: str, split: str, style: str) -> plots.Line:
        density = evaluation["saes"][sae_id][split]["density"]
        return plots.Line(_name(evaluation, sae_id), density["log10_edges"][first:], density["counts"][first:], style)

    for group in groups:
        by_split = {
            split: [histogram(sae_id, split, style) for sae_id, style in _styled(evaluation, group)]
            for split in figures
        }
        most = max(y for series in by_split.values() for line in series for y in line.ys)
        for split, series in by_split.items():
            drawn = plots.steps(
                _depth(evaluation, group), series, "log10 of firing frequency", "latents", include=(most,)
            )
            figures[split].append(drawn)
    return figures


def downstream_plots(
    evaluation: Mapping[str, Any], section: str, key: str, groups: Groups, include: Sequence[float] = ()
) -> dict[str, list[Markup]]:
    """Shift in the layers above each splice by split, neighbours together, all on one scale that is no wider than what
    was measured and `include`; empty where nothing was measured."""
    figures: dict[str, list[Markup]] = {}
    measured = evaluation["comparison"][section]
    reach = [*include, *(y for found in measured.values() for entry in found.values() for y in entry[key])]
    for split, found in measured.items():
        for group in groups:
            series = [
                plots.Line(_name(evaluation, sae_id), found[sae_id]["layers"], found[sae_id][key], style)
                for sae_id, style in _styled(evaluation, group)
                if sae_id in found
            ]
            if series:
                drawn = plots.lines(_depth(evaluation, group), series, "layer", "", include=reach)
                figures.setdefault(split, []).append(drawn)
    return figures


def curve_plots(evaluation: Mapping[str, Any], groups: Groups, metrics: Path) -> list[Markup]:
    """Training FVU over tokens, thinned; none where the run's metrics are not at hand."""
    records: list[dict[str, Any]] = []
    if metrics.is_file():
        for text in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):  # a line that was cut off costs the curve one point
                records.append(json.loads(text))
    records = records[:: max(1, math.ceil(len(records) / CURVE_POINTS))]
    figures = []
    for group in groups:
        series = []
        for sae_id, style in _styled(evaluation, group):
            points = [
                (record["tokens"], record["saes"][sae_id]["fvu"])
                for record in records
                if (record["saes"].get(sae_id, {}).get("fvu") or 0) > 0
            ]
            if points:
                tokens, fvu = zip(*points, strict=True)
                series.append(plots.Line(_name(evaluation, sae_id), tokens, fvu, style))
        if series:
            figures.append(plots.lines(_depth(evaluation, group), series, "tokens", "", log_y=True))
    return figures


def _styled(evaluation: Mapping[str, Any], group: Sequence[str]) -> list[tuple[str, str]]:
    """Each SAE of a group with its kind's class, and dashes from the second of a kind on."""
    styled: list[tuple[str, str]] = []
    for sae_id in group:
        kind = _kind(evaluation["hook_points"][sae_id])
        earlier = sum(style.split()[0] == kind for _, style in styled)
        styled.append((sae_id, f"{kind} dash{earlier}" if earlier else kind))
    return styled


def _name(evaluation: Mapping[str, Any], sae_id: str) -> str:
    point = evaluation["hook_points"][sae_id]
    kind = KIND_NAMES.get(point["kind"], point["kind"])
    name = f"{place(point)} {kind}" if kind else f"layer {place(point)}"
    return f"{name}, {point['activation']}" if "activation" in point else name


def _depth(evaluation: Mapping[str, Any], group: Sequence[str]) -> str:
    layers = [evaluation["hook_points"][sae_id]["layer"] for sae_id in group]
    return f"Layer {layers[0]}" if len(set(layers)) == 1 else f"Layers {layers[0]} to {layers[-1]}"


def _kind(point: Mapping[str, Any]) -> str:
    return str(point["kind"]) if point["kind"] in KIND_NAMES else "other"


def _cells(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cell for splits in evaluation["saes"].values() for cell in splits.values()]
