"""The commands that read one text with all latents, and that rank latents for steering; `main.py` registers them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from qwenscope.cli.options import AsJson, TargetName, err, show
from qwenscope.cli.progress import phases
from qwenscope.cli.tables import plain_table
from qwenscope.errors import CorpusError, FormatError

if TYPE_CHECKING:
    from qwenscope.features.read import Reading
    from qwenscope.features.store import Index

TEXT_LATENTS = 20
"""Latents of a whole text that are shown."""


def read(
    target: TargetName,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]")] = None,
    chat: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Instead of TEXT: JSON, {"messages": [...], "tools": [...]}; - is stdin.'),
    ] = None,
    sae: Annotated[list[str], typer.Option(help="SAE id; repeat it. All by default.")] = [],  # noqa: B006 - typer copies it
    feature_index: Annotated[
        Path | None,
        typer.Option("--index", metavar="INDEX", help="Also rank the text's latents by lift over its densities."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Latents per token and SAE.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Which latents are active on each token of a text, or of a conversation with its roles and tools."""
    from qwenscope.features.read import read as read_given
    from qwenscope.features.store import Index
    from qwenscope.opening import open_target

    if (text is None) == (chat is None):
        raise FormatError("give a TEXT or --chat FILE, one of them")
    messages, tools = (None, None) if chat is None else _conversation(chat)
    index, opened = None if feature_index is None else Index(feature_index), open_target(target)
    for id in sae:
        if id not in opened.saes:
            raise FormatError(f"--sae {id} is not in {target}; it holds {', '.join(opened.saes)}")
    suite = {id: opened.saes[id] for id in sae or opened.saes}
    lm = opened.language_model(truncated=True)
    reading = read_given(lm, lm.tokenizer, messages or text or "", suite, sites=opened.sites, tools=tools)
    show(_found(reading, top, index), as_json, _tables)


def output_scores(
    path: Annotated[Path, typer.Argument(metavar="INDEX")],
    sae: Annotated[list[str], typer.Option(help="SAE id; repeat it. All by default.")] = [],  # noqa: B006 - typer copies it
) -> None:
    """Rank latents for steering: whether a push makes the model say what the latent promotes; kept beside the index."""
    from qwenscope.features.index import open_origin
    from qwenscope.features.output_score import FILE, keep_scores
    from qwenscope.features.output_score import output_scores as scores_of
    from qwenscope.features.store import Index

    index = Index(path)
    for id in sae:
        index.ordinal(id)
    target = open_origin(path)
    lm = target.language_model()
    with phases(err) as on_progress:
        for id in sae or index.saes:
            found, size = [], index.saes[id]["dict_size"]
            for score in scores_of(target, lm, id, range(size)):
                found.append(score)
                on_progress(f"scoring {id}", len(found), size)
            keep_scores(index, {id: found})
    err.print(f"wrote {path / FILE}; sort by it: qwenscope browse {path}", highlight=False, markup=False)


def _conversation(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools of a file."""
    from qwenscope.corpus.repair import parse_json

    try:
        given = parse_json(sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read as JSON ({error})") from None
    given = {"messages": given} if isinstance(given, list) else given
    messages = given.get("messages") if isinstance(given, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise CorpusError(f'{path} holds no conversation: {{"messages": [{{"role", "content"}}, ...], "tools": [...]}}')
    return messages, given.get("tools")


def _found(reading: Reading, top: int, index: Index | None) -> dict[str, Any]:
    """{"tokens": [{"token", "role", "latents": {sae_id: [[latent, activation]]}}], "truncated", "latents"}."""
    tokens: list[dict[str, Any]] = [
        {"token": token, "role": None if reading.roles is None else reading.roles[place], "latents": {}}
        for place, token in enumerate(reading.tokens)
    ]
    counts = Counter[tuple[str, int]]()
    for id, codes in reading.codes.items():
        for place in range(1, len(tokens)):  # the first position is a sink in many models
            pairs = zip(codes.indices[place].tolist(), codes.values[place].tolist(), strict=True)
            active = sorted(((value, latent) for latent, value in pairs if value > 0), reverse=True)
            counts.update((id, latent) for _, latent in active)
            tokens[place]["latents"][id] = [[latent, float(f"{value:.4g}")] for value, latent in active[:top]]
    return {
        "tokens": tokens,
        "truncated": reading.truncated,
        "latents": None if index is None else _lifts(index, counts, len(tokens) - 1),
    }


def _lifts(index: Index, counts: Counter[tuple[str, int]], read: int) -> list[dict[str, Any]]:
    """The latents that fire most beyond their density in the index, which of one that never fired is as if once."""
    density = {id: index.table(id)["density"] for id in {id for id, _ in counts}}
    least = 1 / max(1, index.meta["tokens"])
    lifts = {key: count / read / max(density[key[0]][key[1]], least) for key, count in counts.items()}
    best = sorted(lifts, key=lambda key: (-lifts[key], key))[:TEXT_LATENTS]
    hits = index.hits(best, "text")
    return [
        {"sae": id, "latent": latent, "label": hit["label"], "tokens": counts[id, latent], "lift": lifts[id, latent]}
        for (id, latent), hit in zip(best, hits, strict=True)
    ]


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    table = plain_table()
    ids = list(found["tokens"][-1]["latents"])
    for name in ("", "role", "token", *ids):
        table.add_column(escape(name), overflow="fold")
    for place, each in enumerate(found["tokens"]):
        latents = [
            "  ".join(f"{latent} {value:g}" for latent, value in each["latents"].get(id, [])) or "–" for id in ids
        ]
        table.add_row(str(place), each["role"] or "", escape(repr(each["token"])), *latents)
    table.caption = "cut off at the model's longest text" if found["truncated"] else None
    yield table
    if found["latents"] is not None:
        table = plain_table("Beyond their density in the index")
        for name in ("latent", "on tokens", "times as often", "label"):
            table.add_column(name, overflow="fold")
        for hit in found["latents"]:
            address = f"{hit['sae']}/{hit['latent']}"
            table.add_row(escape(address), str(hit["tokens"]), f"{hit['lift']:.1f}", escape(hit["label"]))
        yield table
