"""Results as tables, for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

_TITLE: dict[str, Any] = {"title_style": "bold", "title_justify": "left", "caption_justify": "left"}
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("fvu", "FVU", ".3f"),
    ("explained_variance", "EV", ".3f"),
    ("l0", "L0", ".1f"),
    ("dead_fraction", "dead", ".1%"),
    ("ce_recovered_zero", "CE zero", ".3f"),
    ("ce_recovered_mean", "CE mean", ".3f"),
)
"""Figures of an evaluation that the terminal shows: key, heading, format."""


def bytes_text(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def number_text(value: float | None, form: str) -> str:
    """A number, or a dash for one that does not exist."""
    return "–" if value is None else format(value, form)


def plain_table(title: str = "", **options: Any) -> Table:
    """A table without lines."""
    return Table(box=None, padding=(0, 2, 0, 0), title=title or None, **_TITLE, **options)


def _two_columns() -> Table:
    """Names and what is said of them."""
    table = plain_table(show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    return table


def keys_table(keys: Mapping[str, str]) -> Table:
    """A recipe's keys and what they mean."""
    table = _two_columns()
    for key, meaning in keys.items():
        table.add_row(escape(key), escape(meaning))
    return table


def evaluation_table(result: Mapping[str, Any]) -> Table:
    """One row per SAE and split of an `evaluation.json` object."""
    table = plain_table("Held-out evaluation")
    table.caption = "EV explained variance (1 - FVU), CE: cross-entropy recovered against zero and mean ablation"
    table.add_column("SAE", no_wrap=True)
    table.add_column("split", no_wrap=True)
    for _, heading, _ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for sae_id, splits in result["saes"].items():
        for position, (split, cell) in enumerate(splits.items()):
            numbers = (number_text(cell[key], form) for key, _, form in COLUMNS)
            table.add_row(
                sae_id if position == 0 else "",
                split,
                *numbers,
                end_section=position == len(splits) - 1 and len(splits) > 1,
            )
    return table


def evaluation_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The table of an `evaluation.json` object, and those of its usefulness where that was measured."""
    yield evaluation_table(result)
    if "usefulness" in result:
        yield _usefulness_table(result["usefulness"], "Sparse probing")
    if "tasks" in result:
        yield _usefulness_table(result["tasks"], f"Sparse probing of {escape(result['tasks']['origin'])}")


def _usefulness_table(found: Mapping[str, Any], title: str) -> Table:
    """One row per SAE: how well 1, 4 and 16 of its latents tell labels apart, and of a frozen decoder's; absorption and
    centring."""
    from qwenscope.evaluation.report import absorbed

    table = plain_table(title)
    table.caption = (
        f"AUROC of the best 1, 4 and 16 latents for {escape(', '.join(found['labels']))}, mean; *: of a decoder that "
        f"was never trained; rows: all dimensions. The token alone: {found['tokens']['auroc']:.3f}. abs.: tokens whose "
        "label another latent absorbed; m/s: |mean| / std of the rows"
    )
    table.add_column("SAE", no_wrap=True)
    for heading in ("1", "4", "16", "1*", "4*", "16*", "rows", "abs.", "abs.*", "m/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for sae_id, figures in found["saes"].items():
        probing = figures["probing"]
        few = [probing[name][k]["auroc"] for name in ("latents", "frozen decoder") for k in ("1", "4", "16")]
        numbers = (f"{value:.3f}" for value in (*few, probing["rows"]["all"]["auroc"]))
        shares = (number_text(share, ".1%") for share in absorbed(figures))
        table.add_row(sae_id, *numbers, *shares, f"{figures['mean_over_std']:.2f}")
    return table


def comparison_table(result: Mapping[str, Any]) -> Table:
    """`compare`'s object: per layer and split, both suites' numbers side by side."""
    table = plain_table(escape("{first} against {second}".format(**result["suites"])))
    table.caption = "shared: latents of the first with a decoder direction in the second above cosine 0.7"
    for heading in ("layer", "split", "FVU", "", "L0", "", "CE mean", "", "shared"):
        table.add_column(heading, justify="left" if heading == "split" else "right", no_wrap=True)
    for pair in result["pairs"]:
        found = pair["latents"]["overlap"]["first_in_second"]
        shared = "–" if found is None else f"{found['shared']:.1%}"  # None: a dictionary is all dead
        for split, sides in pair["splits"].items():
            cells = []
            for key, form in (("fvu", ".3f"), ("l0", ".1f"), ("ce_recovered_mean", ".3f")):
                cells += [number_text(sides[side][key], form) for side in ("first", "second")]
            table.add_row(str(pair.get("site", pair["layer"])).removeprefix("layers."), split, *cells, shared)
    return table


def doctor_table(report: Mapping[str, Any]) -> Table:
    """`doctor.examine`'s report as two columns, problems and cures last."""
    table = _two_columns()
    table.add_row("python", f"{report['python']} on {report['platform']}")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    cpu = report["cpu"]
    bf16 = "bf16 products in hardware" if cpu["bf16_products"] else "no bf16 products"
    table.add_row("cpu", f"{cpu['cores']} cores, torch threads: {cpu['torch_threads']}, {cpu['capability']}, {bf16}")
    for device in report["devices"]:
        table.add_row("gpu", f"{device['name']}, {bytes_text(device['memory_bytes'])}, sm {device['capability']}")
    if not report["devices"]:
        table.add_row("gpu", "none: enough for the stand-in and models as small as smollm2-135m")
    table.add_row("memory", bytes_text(report["memory_bytes"]))
    table.add_row("disk free", bytes_text(report["disk_free_bytes"]))
    kernels = report["kernels"].items()
    table.add_row("kernels", ", ".join(f"{part}: {kernel['used']}" for part, kernel in kernels))
    for part, kernel in kernels:
        if kernel["costs"]:
            table.add_row("[yellow]slower[/]", f"{part} without a fused kernel: {kernel['costs']}")
    for missing in report["missing"]:
        offer = f"{missing['package']}: {missing['buys']}; {missing['get']}"
        table.add_row("[yellow]optional[/]", escape(offer))
    for problem in report["problems"]:
        table.add_row("[red]problem[/]", escape(problem))
    if (test := report.get("self_test")) is not None:
        verdict = "[green]same bits after a kill[/]" if test["identical"] else "[red]different bits after a kill[/]"
        table.add_row("self-test", f"{verdict}: {test['detail']}")
    return table


def survey_tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """The `data --json` object: one row per source, then what was dropped and scrubbed."""
    sources = Table(box=box.SIMPLE_HEAD, title="Corpus", **_TITLE)
    for heading in ("source", "rows read", "kept", "truncated", "tokens", "share"):
        sources.add_column(heading, justify="left" if heading == "source" else "right")
    for name, cell in report["sources"].items():
        sources.add_row(
            name,
            f"{cell['rows_in']:,}",
            f"{cell['rows_kept']:,}",
            f"{cell['truncated']:,}",
            f"{cell['tokens']:,}",
            f"{cell['share']:.1%}",
        )
    sources.caption = f"{report['tokens']:,} tokens, padding {report['padding_share']:.1%} of the batches"
    yield sources
    rules = Table(box=box.SIMPLE_HEAD, title="Left out and scrubbed", **_TITLE)
    rules.add_column("rule")
    rules.add_column("count", justify="right")
    for name, cell in report["sources"].items():
        for reason, count in sorted(cell["dropped"].items()):
            rules.add_row(escape(f"{name}: {reason}"), f"{count:,}")
    for kind, count in sorted(report["scrubbed"].items()):
        rules.add_row(f"scrubbed: {kind}", f"{count:,}")
    if rules.row_count:
        yield rules


def plan_tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """Memory per component against the card, then speed, time and cost as ranges."""
    cards = f"{report['gpus']} x {report['gpu']}"
    memory = Table(box=box.SIMPLE_HEAD, title=f"Memory per card ({cards})", **_TITLE)
    memory.add_column("component")
    memory.add_column("size", justify="right")
    for name, size in report["memory_bytes"].items():
        memory.add_row(name.replace("_", " "), bytes_text(size))
    verdict = "[green]fits[/]" if report["fits"] else "[red]does not fit[/]"
    memory.add_section()
    memory.add_row(
        f"total: {verdict} in {bytes_text(report['memory_card_bytes'])}", bytes_text(report["memory_total_bytes"])
    )
    yield memory
    speed = _two_columns()
    low, high = report["tokens_per_second"]
    speed.add_row("tokens per second", f"{low:,} to {high:,}")
    speed.add_row("hours", "{:.2f} to {:.2f}".format(*report["hours"]))
    once = ", ".join(
        f"{name.replace('_', ' ')} {optimistic:.1f} to {cautious:.1f} s"
        for name, (cautious, optimistic) in report["seconds_once"].items()
    )
    speed.add_row("of these, once", once)
    if report["cost_usd"]:
        speed.add_row("cost", "{:,.0f} to {:,.0f} USD at 2026 on-demand prices".format(*report["cost_usd"]))
    if report["measured"]:
        text = (
            "product {product_tflops:.3g} TFLOP/s, copy {traffic_tb_s:.3g} TB/s; language model at {lm_share:.0%} of it"
        )
        speed.add_row("measured here", text.format(**report["measured"]))
    for line in report["advice"]:
        speed.add_row("[yellow]advice[/]", line)
    yield speed


def contrast_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The latents with the largest effects, then what they must be compared with, then how else the piles differ."""
    latents = plain_table("{found} of {tested:,} latents found at a false discovery rate of {fdr:.0%}".format(**result))
    latents.caption = "adjusted: the effect without length and roles; with, without: conversations it is active in"
    for heading in ("SAE", "latent", "effect", "95 %", "adjusted", "q", "with", "without"):
        latents.add_column(heading, justify="left" if heading == "SAE" else "right", no_wrap=True)
    for cell in result["latents"][:10]:
        effect, adjusted = (format(cell[key], ".2f") for key in ("effect", "adjusted_effect"))
        active = [format(cell["active"][side], ".0%") for side in ("positive", "negative")]
        q, latent = format(cell["q"], ".1g"), str(cell["latent"])
        latents.add_row(cell["sae"], latent, effect, interval_text(cell["interval"]), adjusted, q, *active)
    yield latents
    compared = plain_table("How well the piles can be told apart, on held-out conversations")
    for heading in ("SAE", "by", "AUROC", "95 %", "accuracy"):
        compared.add_column(heading, justify="left" if heading in ("SAE", "by") else "right", no_wrap=True)
    for sae_id, cells in result["controls"].items():
        for place, (name, cell) in enumerate(cells.items()):
            numbers = (
                format(cell["auroc"], ".3f"),
                interval_text(cell["interval"]),
                format(cell["balanced_accuracy"], ".1%"),
            )
            compared.add_row(sae_id if place == 0 else "", name, *numbers)
    yield compared
    yield _confounds_table(result["confounds"])


def diff_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The latents that fire more on one side than on the other, those that fire together side by side; of two
    checkpoints also on which tokens, and how well the SAEs fit.
    """
    where, what = ("changed on", "change") if "fvu" in result else ("strongest in", "fire")
    table = plain_table("{found} of {tested:,} latents found at a false discovery rate of {fdr:.0%}".format(**result))
    table.caption = f"a, b: share of tokens on which it fires; #: latents that {what} in the same conversations"
    for heading, width in (
        ("#", 2),
        ("SAE", 12),
        ("latent", 6),
        ("effect", 6),
        ("95 %", 14),
        ("q", 6),
        ("a", 6),
        ("b", 6),
    ):
        table.add_column(heading, justify="left" if heading == "SAE" else "right", no_wrap=True, min_width=width)
    table.add_column(where, no_wrap=True)
    for cell in sorted(result["latents"], key=lambda cell: cell["group"]):
        rates = (format(cell["rate"][side], ".2%") for side in ("a", "b"))
        said = " ".join(repr(each["token"]) for each in cell.get("tokens", []))
        if "fvu" not in result and cell["conversations"]:
            said = " ".join(cell["conversations"][0]["text"].split())
        numbers = format(cell["effect"], ".2f"), interval_text(cell["interval"]), format(cell["q"], ".1g"), *rates
        table.add_row(str(cell["group"]), cell["sae"], str(cell["latent"]), *numbers, escape(said[:40]))
    yield table
    if "fvu" in result:
        fit = plain_table(escape("How well the SAEs fit {a} (a) and {b} (b)".format(**result["model"])))
        for heading in ("SAE", "FVU a", "FVU b", "change", "95 %"):
            fit.add_column(heading, justify="left" if heading == "SAE" else "right", no_wrap=True)
        for sae_id, cell in result["fvu"].items():
            fit.add_row(
                sae_id,
                *(format(cell[key], ".4f") for key in ("a", "b", "change")),
                interval_text(cell["interval"], ".4f"),
            )
        yield fit


def experiment_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """What `steer --scenarios` shows: each trait's own check by strength beside its controls, then what it does to
    all checks.
    """
    doses = plain_table("{scenarios} scenarios, {repeats} of each: how often checks hold".format(**result))
    doses.caption = (
        "at: positions; dose: strength; change: from the unsteered runs; ppl: perplexity under the unsteered model"
    )
    for heading in ("trait", "arm", "at", "dose", "check", "rate", "change", "95 %", "KL", "ppl"):
        left = heading in ("trait", "arm", "check")
        width = {"arm": 16, "at": 7, "change": 6, "95 %": 14, "KL": 5, "ppl": 5}.get(heading, 4)
        doses.add_column(heading, justify="left" if left else "right", no_wrap=True, min_width=width)
    plain = result["unsteered"]
    for check, rate in plain["checks"].items():
        doses.add_row("", "unsteered", "", "", check, f"{rate:.0%}", "", "", "", f"{plain['perplexity']:.3g}")
    for cell in result["effects"]:
        check = result["traits"][cell["trait"]]
        told = cell["checks"][check]
        dose = "" if cell["strength"] is None else f"{cell['strength']:g}"
        rate, change = f"{told['rate']:.0%}", f"{told['difference']:+.0%}"
        figures = (
            rate,
            change,
            interval_text(told["interval"], "+.0%"),
            f"{cell['kl']:.3f}",
            f"{cell['perplexity']:.3g}",
        )
        doses.add_row(cell["trait"], cell["arm"], cell["position"] or "", dose, check, *figures)
    yield doses
    crossed = plain_table("What each trait changes, at strength {strength:g}, {position}".format(**result["matrix"]))
    crossed.add_column("trait")
    for check in plain["checks"]:
        crossed.add_column(escape(check), justify="right")
    for trait, changes in result["matrix"]["traits"].items():
        crossed.add_row(escape(trait), *(f"{change:+.0%}" for change in changes.values()))
    yield crossed


def monitor_table(result: Mapping[str, Any]) -> Table:
    """What `monitor fit` says: the SAE, its latents, and what the stated rate rests on."""
    table = _two_columns()
    latents = result["latents"]
    more = f" and {len(latents) - 12} more" if len(latents) > 12 else ""
    table.add_row("latents", f"{', '.join(map(str, latents[:12]))}{more} of {result['sae']} at {result['site']}")
    low, high = result["calibration"]["rate_interval"]
    count = result["calibration"]["conversations"]
    table.add_row("false positives", f"{result['fpr']:.2%}, on {count:,} conversations: {low:.2%} to {high:.2%}")
    table.add_row("threshold", f"{result['threshold']:.4g}")
    for sae_id, cell in result["held_out"].items():
        table.add_row(
            f"AUROC {sae_id}", f"{cell['auroc']:.3f} ({interval_text(cell['interval'])}), held-out conversations"
        )
    return table


def monitor_test_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """What `monitor test` says: whether the stated rate holds, then the monitor and its controls on every slice."""
    stated = plain_table(f"At the threshold for {result['fpr']:.2%} false positives")
    for heading in ("slice", "with", "without", "false positives", "recall", "holds"):
        stated.add_column(heading, justify="left" if heading == "slice" else "right", no_wrap=True)
    for name, cell in result["slices"].items():
        counts = (f"{cell['conversations'][side]:,}" for side in ("positive", "negative"))
        false, recall = cell["stated"]["false_positives"], cell["stated"]["recall"]
        shown = f"{false['rate']:.1%} ({interval_text(false['interval'], '.1%')})"
        found = "–" if recall is None else f"{recall['rate']:.1%}"
        stated.add_row(escape(name), *counts, shown, found, "yes" if cell["stated"]["holds"] else "[red]no[/]")
    yield stated
    for name, cell in result["slices"].items():
        if cell["by"]:
            yield _compared(name, cell["by"])


def _compared(name: str, by: Mapping[str, Any]) -> Table:
    table = plain_table(escape(f"How well conversations can be told apart: {name}"))
    for heading in ("by", "AUROC", "95 %", "recall at 1 %", "recall at 0.1 %"):
        table.add_column(heading, justify="left" if heading == "by" else "right", no_wrap=True)
    for control, cell in by.items():
        recalls = (
            "too few" if "refused" in at else f"{at['recall']:.0%} ({interval_text(at['interval'], '.0%')})"
            for at in cell["at"].values()
        )
        table.add_row(control, f"{cell['auroc']:.3f}", interval_text(cell["interval"]), *recalls)
    return table


def _confounds_table(confounds: Mapping[str, Any]) -> Table:
    table = plain_table("What else differs between the piles")
    for heading in ("", "positive", "negative", "p"):
        table.add_column(heading, justify="left" if heading == "" else "right", overflow="fold")
    numbers = [("mean tokens", confounds["length"], ".1f")]
    numbers += [(f"share of {role}", cell, ".1%") for role, cell in confounds["roles"].items()]
    for name, cell, form in numbers:
        table.add_row(name, *(format(cell[side], form) for side in ("positive", "negative")), format(cell["p"], ".2g"))
    for name in ("language", "source"):
        cell = confounds[name]
        sides = (", ".join(f"{value} {n}" for value, n in cell[side].items()) for side in ("positive", "negative"))
        table.add_row(name, *map(escape, sides), "" if cell["p"] is None else format(cell["p"], ".2g"))
    return table


def interval_text(interval: list[float] | None, form: str = ".2f") -> str:
    """0.1 to 0.3, or a dash."""
    return "–" if interval is None else " to ".join(format(edge, form) for edge in interval)
