"""The `qwenscope` command: argument handling only; each command calls one function of a room.

Rooms are imported inside the commands, so that `--help` answers at once. A `QwenscopeError` becomes one line on stderr
and its own exit code; with `--debug` the traceback is shown as well.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from qwenscope.cli import analysis, features, reading
from qwenscope.cli.demo import run_demo
from qwenscope.cli.options import (
    AsJson,
    Data,
    Out,
    Overrides,
    RecipeName,
    TargetName,
    Tokens,
    err,
    out,
    per_latent,
    read_recipe,
    set_up_output,
    show,
)
from qwenscope.cli.progress import phases, train_with_progress
from qwenscope.cli.tables import (
    comparison_table,
    doctor_table,
    evaluation_tables,
    keys_table,
    plan_tables,
    survey_tables,
)
from qwenscope.errors import FormatError, QwenscopeError, RecipeError
from qwenscope.files import refused
from qwenscope.sae.format_names import Read, Written


class _DefaultGroup(TyperGroup):
    """A group whose first word may be the argument of its `default` command: `data RECIPE` beside `data generate`."""

    default = "survey"

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args and args[0] in self.commands
        return super().resolve_command(ctx, args if known else [self.default, *args])

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """With the flags of the default command, which the group takes as its own."""
        super().format_help(ctx, formatter)
        command = self.commands[self.default]
        command.format_help(type(ctx)(command, info_name=self.default, parent=ctx), formatter)


_RANK = os.environ.get("RANK")  # of several processes that torchrun has started

app = typer.Typer(
    name="qwenscope",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, measure and release sparse autoencoders for large language models.",
    epilog="Add --debug to any command for a traceback with an error.",
)
data_app = typer.Typer(
    cls=_DefaultGroup,
    no_args_is_help=True,
    context_settings={"ignore_unknown_options": True},
    help="Look at a recipe's corpus (`data RECIPE`), or generate tool-use conversations (`data generate`).",
)
app.add_typer(data_app, name="data", rich_help_panel="Before training")


@app.command(rich_help_panel="Start here")
def demo(
    out_: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/demo"),
    open_: Annotated[bool, typer.Option("--open", help="Look at the latents in the web browser at the end.")] = False,
) -> None:
    """Train, evaluate, package and index nine SAEs on the packaged stand-in model, in minutes on a CPU."""
    index_folder = run_demo(out_, err, out)
    if open_:
        features.browse(index_folder, open_=True)


@app.command(rich_help_panel="Start here")
def doctor(
    as_json: AsJson = False,
    self_test: Annotated[bool, typer.Option("--self-test", help="Also train, kill, resume and compare.")] = False,
) -> None:
    """Versions, devices, kernels; what is missing and how to get it."""
    from qwenscope.doctor import examine

    report = examine()
    if self_test:
        import tempfile

        from qwenscope.training.self_test import self_test as run_self_test

        with tempfile.TemporaryDirectory(prefix="qwenscope-") as folder:
            report["self_test"] = run_self_test(Path(folder))
    show(report, as_json, doctor_table)


def _help_keys(asked: bool) -> None:
    if asked:
        from qwenscope.recipe import keys

        out.print(keys_table(keys()))
        raise typer.Exit


@app.command(rich_help_panel="Before training")
def recipe(
    name: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Packaged recipe or a YAML file.")] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option("--for", metavar="MODEL", help="Write a recipe for this model: Hub id or folder.")
    ] = None,
    sites: Annotated[
        str | None, typer.Option(metavar="SITES", help="With --for: where to read, such as 6,layers.6.mlp.")
    ] = None,
    dict_size: Annotated[int | None, typer.Option(min=4, help="With --for: latents of each SAE.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="With --for: documents or conversations to train on.")
    ] = None,
    help_keys: Annotated[
        bool,
        typer.Option("--help-keys", help="Say what every key means, and exit.", is_eager=True, callback=_help_keys),
    ] = False,
) -> None:
    """Print a recipe with every key and default written out, or write one for a language model (--for)."""
    if (name is None) == (model is None):
        raise RecipeError("name a recipe, or a language model with --for")
    if name is not None:
        sys.stdout.write(read_recipe(name, overrides).to_yaml())
        return
    from qwenscope.planning.suggest import suggest

    if overrides:
        raise RecipeError("--for writes a new recipe, to be edited; --set changes one that is there")
    sys.stdout.write(suggest(str(model), sites=sites.split(",") if sites else (), dict_size=dict_size, data=data))


@app.command(rich_help_panel="Before training")
def plan(
    name: RecipeName,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Card to plan for, by its data sheet. By default the device at hand is measured (ten seconds); "
            "h200 if there is no GPU and the recipe does not ask for a CPU.",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(metavar="N", min=1, max=100_000, help="How many of them, under torchrun.")] = 1,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Memory, tokens per second, hours and cost of a recipe, before anyone rents a machine."""
    from qwenscope.planning.measure import measurable, measure
    from qwenscope.planning.plan import plan as make_plan
    from qwenscope.planning.plan import read_config

    recipe = read_recipe(name, overrides)
    measured = None
    if gpu is None and measurable(recipe):
        config = read_config(recipe)
        err.print("measuring this machine for about ten seconds; --gpu NAME plans by a data sheet", highlight=False)
        measured = measure(recipe, config)
    report = make_plan(recipe, gpu or "h200", gpus, measured=measured)
    show(report, as_json, plan_tables)


@data_app.command()
def survey(
    name: RecipeName,
    as_json: AsJson = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Conversations to read; all of a run's by default.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Write the kept conversations as jsonl.")] = None,
    overrides: Overrides = None,
) -> None:
    """The corpus as it will be trained on: counts per source, token shares, padding, privacy report."""
    from qwenscope.corpus.survey import survey as run_survey
    from qwenscope.lm.batches import cut
    from qwenscope.lm.load import load_tokenizer

    loaded = read_recipe(name, overrides)
    report = run_survey(loaded, load_tokenizer(loaded.lm), cut, limit=limit, dump=dump)
    show(report, as_json, survey_tables)


@data_app.command()
def generate(
    n: Annotated[int, typer.Option("--n", min=1, help="Conversations.")],
    path: Annotated[Path, typer.Option("--out", help="A .jsonl or .jsonl.gz file.")],
    seed: Annotated[int, typer.Option(help="Same seed, same conversations.")] = 0,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="From the template families kept for evaluation.")
    ] = False,
) -> None:
    """Write synthetic tool-use conversations."""
    from qwenscope.corpus.tool_use import write_tool_use

    write_tool_use(path, n, seed, held_out=held_out)
    err.print(f"{n:,} conversations in {path}", markup=False)


@app.command(rich_help_panel="Train and measure")
def train(
    name: RecipeName,
    run: Annotated[Path, typer.Option("--out", help="Run folder.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint that verifies.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train every SAE of a recipe in one pass of the language model; under torchrun, on several devices at once."""
    console = err if _RANK in (None, "0") else Console(quiet=True)
    train_with_progress(read_recipe(name, overrides), run, resume, console)


@app.command(rich_help_panel="Train and measure")
def evaluate(
    target: TargetName,
    data: Data = None,
    tokens: Tokens = None,
    until_interval: Annotated[
        float | None,
        typer.Option(
            min=1e-6, metavar="WIDTH", help="Read no more than makes the intervals of FVU and CE recovered so narrow."
        ),
    ] = None,
    probing: Annotated[
        bool,
        typer.Option("--probing", help="Measure usefulness too: sparse probing beside a frozen decoder and others."),
    ] = False,
    tasks: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="The same for what rows state as labels: {NAME: VALUE}."),
    ] = None,
    path: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder to write, if not TARGET.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure fidelity and the effect on the language model; write evaluation.json and report.html.

    With --data NAME and no --out, these are evaluation-NAME.json and report-NAME.html.
    """
    from qwenscope.evaluation.run import evaluate as run_evaluation

    with phases(err) as on_progress:
        result = run_evaluation(
            target,
            data=data,
            tokens=tokens,
            until_interval=until_interval,
            probing=probing,
            tasks=tasks,
            out=path,
            on_progress=on_progress,
        )
    show(result, as_json, evaluation_tables)


@app.command(rich_help_panel="Train and measure")
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="What `evaluate` takes; names the language model.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    data: Data = None,
    tokens: Tokens = None,
    as_json: AsJson = False,
) -> None:
    """Measure two suites on the same tokens, layer by layer, and match their latents."""
    from qwenscope.evaluation.compare import compare as compare_suites

    show(compare_suites(first, second, data=data, tokens=tokens), as_json, comparison_table)


for command in (
    *(features.index, features.browse, reading.read, features.steer, reading.output_scores, features.explain),
    *(analysis.contrast, analysis.diff, analysis.trace),
):
    app.command(command.__name__.replace("_", "-"), rich_help_panel="Look and steer")(command)
app.add_typer(analysis.monitor, name="monitor", rich_help_panel="Look and steer")


@app.command(rich_help_panel="Share")
def export(
    target: TargetName,
    to: Annotated[Written, typer.Option(help="Format.")],
    path: Out,
    feature_index: Annotated[
        Path | None, typer.Option("--index", metavar="INDEX", help="For neuronpedia: add activations and explanations.")
    ] = None,
    sae: Annotated[
        list[str], typer.Option(help="For control-vector and directions: SAE id; once, or once per --latent.")
    ] = [],  # noqa: B006 - typer copies it
    latent: Annotated[list[int], typer.Option(min=0, help="Its latent; repeat it for several.")] = [],  # noqa: B006
    strength: Annotated[
        list[float], typer.Option(help="How far along its unit direction; once, or once per --latent.")
    ] = [1.0],  # noqa: B006
) -> None:
    """Write the SAEs in another library's format, or directions of chosen latents."""
    if feature_index is not None:
        if to != "neuronpedia":
            raise FormatError(f"--index adds activations to --to neuronpedia; {to} holds weights alone")
        from qwenscope.release.neuronpedia import export_with_index

        export_with_index(target, feature_index, path)
        return
    from qwenscope.sae.formats import OF_LATENTS, export_latents, export_suite
    from qwenscope.sae.formats.directions import Push

    if to in OF_LATENTS:
        chosen = zip(per_latent("--sae", sae, latent), latent, per_latent("--strength", strength, latent), strict=True)
        export_latents(target, to, [Push(*each) for each in chosen], path)
        return
    if latent:
        raise FormatError(f"--latent chooses for {' and '.join(OF_LATENTS)}; {to} holds whole SAEs")
    export_suite(target, to, path)


@app.command("import", rich_help_panel="Share")
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder, file or Hub repository.")],
    origin: Annotated[Read, typer.Option("--from", help="Format.")],
    path: Out,
) -> None:
    """Read SAEs of another library into our format."""
    from qwenscope.sae.formats import import_suite

    import_suite(source, origin, path)


@app.command(rich_help_panel="Share")
def release(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A complete, evaluated run.")],
    path: Out,
    push: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="Upload to this Hub repository.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: only list the files.")] = False,
    tag: Annotated[str, typer.Option(help="With --push: the tag that makes the release visible, set last.")] = "v1",
) -> None:
    """Build the release folder with its model card, and publish it if asked."""
    from qwenscope.release.package import release as build_release
    from qwenscope.release.push import push as push_folder

    if dry_run and push is None:
        raise RecipeError("--dry-run lists what --push ORG/NAME would upload; name the repository")
    build_release(run, path, repo=push)
    if push is not None:
        for line in push_folder(path, push, tag=tag, dry_run=dry_run):
            out.print(line, markup=False)


@app.command(rich_help_panel="Share")
def pull(
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME")],
    path: Out,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag; the main branch by default.")] = None,
) -> None:
    """Fetch a whole suite from the Hub, verified. Run again, it goes on."""
    from qwenscope.release.push import pull as pull_suite

    pull_suite(repo, path, revision=revision)


def _take_debug_flag() -> bool:
    """`--debug` may stand anywhere on the line, unless after `--`."""
    before = sys.argv[: sys.argv.index("--")] if "--" in sys.argv else sys.argv
    if "--debug" not in before:
        return False
    sys.argv.remove("--debug")
    return True


def main() -> None:
    """Entry point of the console script and of `python -m qwenscope`."""
    debug = _take_debug_flag()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if debug else "error")  # `doctor` names missing kernels
    set_up_output(debug)
    try:
        app()
    except (QwenscopeError, OSError) as unknown:
        error = unknown if isinstance(unknown, QwenscopeError) else refused(unknown)
        if debug or error is None:
            raise
        label = "error" if _RANK is None else f"error on rank {_RANK}"
        err.print(f"[bold red]{label}[/]:", escape(str(error)), highlight=False)
        sys.exit(error.exit_code)
