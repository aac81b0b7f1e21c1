"""The commands that look at features and steer with them; `main.py` registers them."""

from __future__ import annotations

import os
import webbrowser
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape

from qwenscope.cli.options import Data, Out, TargetName, err, out, per_latent, show
from qwenscope.cli.progress import phases
from qwenscope.cli.tables import experiment_tables
from qwenscope.errors import FormatError

if TYPE_CHECKING:
    from qwenscope.features.clients import Client
    from qwenscope.features.continuation import Piece
    from qwenscope.features.label import Cost
    from qwenscope.features.steering import Steering
    from qwenscope.features.steering import Where as At
    from qwenscope.features.store import Index
    from qwenscope.lm.model import LanguageModel
    from qwenscope.opening import Target

SHOWN_LABELS = 100
"""Of more latents than these the labels are not printed one by one."""


def index(
    target: TargetName,
    path: Out,
    data: Data = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 1_000_000,
) -> None:
    """Index every latent: examples, histograms, promoted tokens, neighbours, experts. Run again, it goes on."""
    from qwenscope.features.index import build_index

    with phases(err) as on_progress:
        build_index(target, path, data=data, tokens=tokens, on_progress=on_progress)
    err.print(f"wrote {path}; look at it: qwenscope browse {path}", highlight=False, markup=False)


def browse(
    path: Annotated[Path, typer.Argument(metavar="INDEX")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 takes a free one.")] = 8321,
    export_: Annotated[Path | None, typer.Option("--export", metavar="DIR", help="Write a static site.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the web browser.")] = False,
    results: Annotated[
        list[Path],
        typer.Option(metavar="PATH", help="Contrast, diff, monitor, its test or scenarios to show; repeat it."),
    ] = [],  # noqa: B006 - typer copies it
    embed_in: Annotated[
        list[str],
        typer.Option(metavar="ORIGIN", help="Whose pages may frame one latent (/embed#/SAE/LATENT); repeat it."),
    ] = [],  # noqa: B006
) -> None:
    """Look at features in the web browser, offline; or write the same as a static site."""
    if export_ is not None:
        if results or embed_in:
            raise FormatError(
                "--results and --embed-in need a server and are not exported; leave them out, or --export"
            )
        from qwenscope.features.browser.export import export_site

        with phases(err) as on_progress:
            export_site(path, export_, on_progress=on_progress)
        err.print(f"wrote {export_}; look at it: python -m http.server -d {export_}", highlight=False, markup=False)
        return
    from qwenscope.features.browser.server import serve
    from qwenscope.features.store import Index

    opened = Index(path)
    shown = []
    if results:
        from qwenscope.analysis.results import read_results  # with scikit-learn, which takes a second

        shown = read_results(results, opened)

    def ready(address: str) -> None:
        err.print(f"{address}  (Ctrl-C ends it)", highlight=False)
        if open_:
            webbrowser.open(address)

    try:
        serve(opened, port, results=shown, framing=embed_in, on_ready=ready)
    except KeyboardInterrupt:
        os._exit(130)  # at once: the interpreter's own end takes seconds among so many modules, or waits for a model


class Mode(StrEnum):
    """What steering does with a latent."""

    add = "add"
    clamp = "clamp"
    ablate = "ablate"


class Where(StrEnum):
    """Which positions are steered."""

    answer = "answer"
    all = "all"
    prefill = "prefill"
    decode = "decode"


def steer(
    target: TargetName,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]")] = None,
    sae: Annotated[list[str], typer.Option(help="SAE id; once, or once per --latent.")] = [],  # noqa: B006
    latent: Annotated[list[int], typer.Option(min=0, help="Its latent; repeat it to steer several together.")] = [],  # noqa: B006
    strength: Annotated[
        list[float], typer.Option(help="Share of the stream's norm, or see --index; once, or per --latent.")
    ] = [1.0],  # noqa: B006 - typer copies it
    mode: Annotated[Mode, typer.Option(help="What to do with the latents.")] = Mode.add,
    where: Annotated[
        Where, typer.Option(help="Positions; answer: from the beginning of the assistant's turn.")
    ] = Where.answer,
    find_range: Annotated[
        bool, typer.Option("--range", help="Of one latent: measure what strengths do, take one that keeps the text.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write per run.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=10, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest with this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of drawing, and of the random controls.")] = 0,
    steering: Annotated[
        Path | None, typer.Option(metavar="FILE", help="SAEs, latents and strengths of a file, such as a contrast's.")
    ] = None,
    feature_index: Annotated[
        Path | None, typer.Option("--index", metavar="INDEX", help="Take each latent's maximum there as its unit.")
    ] = None,
    scenarios: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead of PROMPT: many conversations, traits, strengths, checks."),
    ] = None,
    path: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="With --scenarios: its runs; goes on after a kill.")
    ] = None,
) -> None:
    """Write on under steered latents, beside the unsteered model and the controls that tell an effect from noise."""
    if scenarios is not None or prompt is None:
        _experiment(target, scenarios, path, alone=prompt is None and not latent and steering is None)
        return
    from qwenscope.features.continuation import Sampling, answer_start, prompt_tokens, side_by_side
    from qwenscope.features.store import Index
    from qwenscope.opening import open_target

    chosen = _chosen(steering, sae, latent, strength)
    if path is not None:
        raise FormatError("--out goes with --scenarios")
    opened, opened_index = open_target(target), None if feature_index is None else Index(feature_index)
    for id, *_ in chosen:
        if id not in opened.saes:
            raise FormatError(f"--sae {id} is not in {target}; it holds {', '.join(opened.saes)}")
    lm = opened.language_model()
    prompt_ids = prompt_tokens(lm, prompt)
    places: At = slice(answer_start(lm, prompt), None) if where is Where.answer else cast("At", where.value)
    pushes = _pushes(opened, chosen, mode, places, opened_index)
    if find_range:
        pushes = [_within_range(lm, prompt_ids, pushes, max_new_tokens)]
    sampling = Sampling(temperature, top_p, seed)
    _show(side_by_side(lm, prompt_ids, pushes, max_new_tokens=max_new_tokens, sampling=sampling))


def _pushes(
    target: Target, chosen: list[tuple[str, int, float]], mode: Mode, where: At, index: Index | None
) -> list[Steering]:
    """What is steered together, in norms of the row or in each latent's maximum in an index."""
    from qwenscope.features.steering import Steering

    return [
        Steering(
            site=target.targets[id],
            strength=amount,
            sae=target.saes[id],
            latent=number,
            mode=mode.value,
            unit="norm" if index is None else index.latent(id, number)["max"],
            where=where,
        )
        for id, number, amount in chosen
    ]


def _experiment(target: str, scenarios: Path | None, path: Path | None, *, alone: bool) -> None:
    """Many conversations under many pushes, from a file."""
    from qwenscope.analysis.experiments import experiment

    if scenarios is None or path is None or not alone:
        raise FormatError("give a PROMPT and what to steer along, or --scenarios FILE and --out DIR alone")
    with phases(err) as on_progress:
        result = experiment(target, scenarios, path, on_progress=on_progress)
    show(result, False, experiment_tables)
    err.print(f"wrote {path}", highlight=False, markup=False)


def _chosen(
    steering: Path | None, saes: list[str], latents: list[int], strengths: list[float]
) -> list[tuple[str, int, float]]:
    """(SAE id, latent, strength) of what is steered together, from a file or from the options."""
    from qwenscope.features.pushes import read_pushes

    if (steering is None) != bool(latents):
        raise FormatError("name latents with --sae and --latent, or a file of them with --steering")
    if steering is not None:
        return [(push.sae_id, push.latent, push.strength) for push in read_pushes(steering)]
    ids, amounts = per_latent("--sae", saes, latents), per_latent("--strength", strengths, latents)
    return list(zip(ids, latents, amounts, strict=True))


def _show(pieces: Iterable[Piece]) -> None:
    """The steered text as it comes, then its controls, each under its name."""
    texts: dict[str, str] = {}
    for piece in pieces:
        if piece.effect is not None:
            head = f"\n[bold]{escape(piece.run)}[/]  [dim]KL of the next token {piece.effect:.3f} nats[/]"
            texts[piece.run] = ""
            if piece.run == "steered":
                out.print(head, highlight=False)
            else:
                texts[piece.run] = f"{head}\n"
        if piece.run == "steered":
            out.print(piece.text, end="", markup=False, highlight=False)
            if piece.note is not None:
                out.print(f"\n[dim]{escape(piece.note)}[/]", end="", highlight=False)
        else:
            texts[piece.run] += escape(piece.text)
    out.print()
    for text in texts.values():
        if text:
            out.print(text, highlight=False)


def _within_range(lm: LanguageModel, prompt_ids: list[int], pushes: list[Steering], max_new_tokens: int) -> Steering:
    """Show each strength that is tried, in shares of the stream's norm, and what it does; the push at the start."""
    from qwenscope.features.steering_range import KL_BOUND, text_range

    if len(pushes) > 1 or pushes[0].mode == "ablate":
        raise FormatError("--range tries strengths of one latent, added or clamped")
    push = replace(pushes[0], unit="norm")
    found = text_range(lm, prompt_ids, push, max_new_tokens=max_new_tokens)
    for trial in (found.unsteered, *found.trials[: len(found.sound) + 1]):
        verdict = "as it is" if not trial.strength else "text" if trial.is_text else "no text"
        figures = f"KL {trial.kl:5.2f}  {trial.surprise:5.2f} nats  {1 - trial.distinct:4.0%} repeated"
        line = f"{trial.strength:>7.3f}  {verdict:<8} {figures}  {' '.join(trial.text.split())[:60]}"
        out.print(line, highlight=False, markup=False)
    if found.strongest is None:
        raise FormatError("the weakest push that is tried breaks the text; this latent cannot be steered so")
    changed = "no strength below changes it" if found.weakest is None else f"changed from {found.weakest:.3g} on"
    start = found.strongest if found.start is None else found.start
    bound = f"KL within {KL_BOUND:g} nats a token" if found.start is not None else "the strongest text"
    out.print(f"text up to strength {found.strongest:.3g}, {changed}; taken: {start:.3g} ({bound})", highlight=False)
    return replace(push, strength=start)


def explain(
    path: Annotated[Path, typer.Argument(metavar="INDEX")],
    latents: Annotated[
        str, typer.Option(metavar="WHICH", help="all, 0-99,120, or top:500 (those that fire most often), of each SAE.")
    ] = "all",
    sae: Annotated[list[str], typer.Option(metavar="ID", help="SAE; repeat it. All by default.")] = [],  # noqa: B006
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="OpenAI-compatible, with --model.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Model at the endpoint.")] = None,
    key_variable: Annotated[str | None, typer.Option(help="Environment variable that holds the key.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time to the endpoint.")] = 16,
    local: Annotated[str | None, typer.Option(metavar="MODEL", help="A chat model here: Hub id or folder.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="No model: a fixed rule. The default.")] = False,
    delphi: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write all records for delphi.")] = None,
) -> None:
    """Label latents and score the labels by detection and fuzzing. Stopped or killed, the same command goes on."""
    from qwenscope.features.delphi import export_delphi
    from qwenscope.features.label import chosen, foresee, waiting
    from qwenscope.features.label import explain as explain_latents
    from qwenscope.features.store import Index
    from qwenscope.files import check_empty
    from qwenscope.training.signals import SignalWatch

    if delphi is not None:
        check_empty(delphi)
    if (endpoint is not None) + (local is not None) + offline > 1:
        raise FormatError("choose one of --endpoint, --local and --offline")
    client = _client(endpoint, model, key_variable, local)
    opened = Index(path)
    asked = chosen(opened, latents, sae)
    left = waiting(opened, client, asked)
    err.print(_foreseen(client.name, len(asked), foresee(opened, left)), highlight=False, markup=False)
    limit = 1 if endpoint is None else concurrency
    counts = Counter[str]()
    waits = "stopping: waiting for the answers under way; once more ends it at once"
    with SignalWatch(said=waits) as watch, phases(err) as on_progress:
        records = explain_latents(
            opened, client, left, concurrency=limit, on_progress=on_progress, stop=lambda: watch.stop is not None
        )
        for record in records:
            counts.update(["labelled" if record["label"] else "unnamed", *record["unparsed"]])
            if len(left) <= SHOWN_LABELS:
                out.print(_labelled(record), highlight=False, markup=False)
    if watch.stop is not None:
        err.print(f"stopped after {counts['labelled']:,} latents; the same command goes on", highlight=False)
        raise typer.Exit(128 + watch.stop)
    unparsed = sum(counts[name] for name in ("label", "detection", "fuzzing"))
    said = f"; {unparsed:,} answers could not be parsed" if unparsed else ""
    err.print(f"labelled {counts['labelled']:,} latents in {path}{said}", highlight=False, markup=False)
    if delphi is not None:
        err.print(f"wrote {export_delphi(opened, delphi):,} labels to {delphi}", highlight=False, markup=False)
    err.print(f"look at them: qwenscope browse {path}", highlight=False, markup=False)


def _client(endpoint: str | None, model: str | None, key_variable: str | None, local: str | None) -> Client:
    from qwenscope.features.clients import EndpointClient, LocalClient, OfflineClient

    if (endpoint is None) != (model is None):
        raise FormatError("--endpoint URL and --model NAME go together; a model on this machine is --local MODEL")
    if endpoint is not None and model is not None:
        return EndpointClient(endpoint, model, key_variable)
    return OfflineClient() if local is None else LocalClient(local)


def _foreseen(client: str, asked: int, cost: Cost) -> str:
    done = f" ({asked - cost.latents:,} more are labelled already)" if asked > cost.latents else ""
    return (
        f"{cost.latents:,} latents to label by {client}{done}: about {cost.requests:,} requests, "
        f"{cost.tokens_in:,} tokens to read and at most {cost.tokens_out:,} to write"
    )


def _labelled(record: dict[str, Any]) -> str:
    scores = ", ".join(
        f"{kind} {'-' if record[kind] is None else format(record[kind], '.2f')}" for kind in ("detection", "fuzzing")
    )
    return f"{record['sae']} {record['latent']:>6}  {record['label'] or '(no label)'}  ({scores})"
