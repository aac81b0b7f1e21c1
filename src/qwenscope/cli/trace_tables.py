"""What `trace` says, as tables for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from qwenscope.cli.tables import interval_text, plain_table

EXPERTS, LAYERS = 8, 4
"""That are shown."""


def trace_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Where the push acts, which experts are chosen where the latent fires and where it is added, and the states."""
    yield _output_table(result)
    if (routing := result["routing"]) is None:
        yield _absent("No router stands above the site: there are no experts to compare")
    else:
        yield from _routing_tables(routing)
    if (state := result["state"]) is None:
        yield _absent("No DeltaNet layer stands above the site: there is no recurrent state to follow")
    else:
        yield _state_table(state)


def _absent(why: str) -> Table:
    table = plain_table(show_header=False)
    table.add_row(why)
    return table


def _output_table(result: Mapping[str, Any]) -> Table:
    found = result["output"]
    table = plain_table(f"What strength {result['strength']:g} at {result['site']} does to {found['tokens']:,} tokens")
    table.caption = "KL from the unsteered model in nats a token; prefill: pushed before the answer, decode: in it"
    _columns(table, "pushed", "KL", "95 %", "random", "beyond random", "95 %")
    for place, cell in found["positions"].items():
        random = sum(cell["random"]) / len(cell["random"])
        beyond = f"{cell['beyond_random']:+.3g}", interval_text(cell["beyond_random_interval"], "+.3g")
        table.add_row(place, f"{cell['kl']:.3g}", interval_text(cell["interval"], ".3g"), f"{random:.3g}", *beyond)
    return table


def _routing_tables(routing: Mapping[str, Any]) -> Iterator[Table]:
    if (fires := routing["fires"]) is not None:
        title = "Experts of {tokens:,} tokens on which it fires, {matched_tokens:,} of them with the same token silent"
        table = plain_table(title.format(**fires))
        table.caption = "matched: change from the same tokens of the same conversation; p: any expert, permuted labels"
        _columns(table, "layer", "expert", "fires", "others", "matched", "p")
        for cell in fires["experts"][:EXPERTS]:
            apart, p = cell["matched_difference"], cell["p_family"]
            told = "–" if apart is None else f"{apart:+.1%}", "–" if p is None else f"{p:.2g}"
            table.add_row(*_where(cell), f"{cell['fires']:.1%}", f"{cell['others']:.1%}", *told)
        yield table
    added = routing["added"]
    share = f"{added['beyond']:.0%} of experts change by more than along any random direction ({{:.0%}} by chance)"
    table = plain_table(f"Experts where it is added: {share.format(added['beyond_by_chance'])}")
    table.caption = "change: of the share of tokens that choose it; random: under as long pushes at random"
    _columns(table, "layer", "expert", "before", "after", "change", "random")
    for cell in added["experts"][:EXPERTS]:
        change = f"{cell['change']:+.1%}", interval_text(cell["random"], "+.1%")
        table.add_row(*_where(cell), f"{cell['before']:.1%}", f"{cell['after']:.1%}", *change)
    yield table
    table = plain_table("Share of experts that stay the same, where it is added")
    _columns(table, "layer", "latent", "random")
    for place in _spread(len(added["layers"])):
        overlaps = (f"{added['overlap'][name][place]:.1%}" for name in ("latent", "random"))
        table.add_row(str(added["layers"][place]), *overlaps)
    yield table


def _state_table(state: Mapping[str, Any]) -> Table:
    table = plain_table("Change of recurrent states, of {conversations} conversations".format(**state))
    table.caption = "relative to the unsteered state, after so many tokens of the answer"
    tokens = len(state["all"]["latent"][0])
    answer = -state["first"]
    after = {"prompt's end": answer - 1, "1": answer, "8": answer + 7, str(tokens - answer): tokens - 1}
    _columns(table, "layer", "pushed", *(f"after {name}" for name in after if after[name] < tokens), "random, last")
    for place in _spread(len(state["layers"])):
        for where in ("all", "prefill", "decode"):
            own, random = (state[where][name][place] for name in ("latent", "random"))
            shown = (f"{own[at]:.2%}" if at >= 0 else "–" for at in after.values() if at < tokens)
            table.add_row(str(state["layers"][place]), where, *shown, f"{random[-1]:.2%}")
    return table


def _where(cell: Mapping[str, Any]) -> tuple[str, str]:
    return str(cell["layer"]), str(cell["expert"])


def _spread(count: int) -> Sequence[int]:
    """LAYERS places at most, from the first to the last."""
    if count <= LAYERS:
        return range(count)
    return [round(number * (count - 1) / (LAYERS - 1)) for number in range(LAYERS)]


def _columns(table: Table, *headings: str) -> None:
    for heading in headings:
        left = heading in ("pushed", "layer")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
