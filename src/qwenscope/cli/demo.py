"""The whole walk on the packaged stand-in: what `make demo` runs."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from qwenscope.cli.progress import phases, train_with_progress

INDEX_TOKENS = 50_000


def run_demo(run: Path, console: Console, out: Console) -> Path:
    """Train, evaluate, package and index the recipe `standin`, or what is missing of it; say what to type next.

    Returns:
        The index, a folder beside the run.

    Raises:
        QwenscopeError: as the four steps.
    """
    from qwenscope.cli.tables import evaluation_table
    from qwenscope.evaluation.run import evaluate
    from qwenscope.features.index import build_index
    from qwenscope.features.integrity import FILE
    from qwenscope.files import read_json
    from qwenscope.recipe import load_recipe
    from qwenscope.release.package import release

    recipe = load_recipe("standin")
    package, index = run / "release", run.with_name(f"{run.name}-index")
    console.rule("[bold]1 of 4: train[/] nine SAEs from one pass of the stand-in language model", align="left")
    train_with_progress(recipe, run, resume=(run / "status.json").exists(), console=console)
    console.rule("[bold]2 of 4: evaluate[/] on held-out conversations, chat and tool use apart", align="left")
    evaluation = run / "evaluation.json"
    with phases(console) as on_progress:
        result = read_json(evaluation) if evaluation.exists() else evaluate(run, on_progress=on_progress)
    out.print(evaluation_table(result))
    console.rule("[bold]3 of 4: package[/]", align="left")
    if not package.exists():
        release(run, package)
    console.rule("[bold]4 of 4: index[/] what each latent fires on", align="left")
    if not (index / FILE).exists():
        with phases(console) as on_progress:
            build_index(run, index, tokens=INDEX_TOKENS, on_progress=on_progress)
    out.print(_ending(run, package, index), highlight=False, markup=False, soft_wrap=True)
    return index


def _ending(run: Path, package: Path, index: Path) -> str:
    command = sys.argv[0] if Path(sys.argv[0]).name == "qwenscope" else "qwenscope"
    return f"""SAEs      {run / "saes"}
report    {run / "report.html"}
release   {package}
index     {index}

next
  {command} browse {index}
  {command} steer {run} --index {index} --sae sae_attn_mid --latent 40 "Book a table"
  {command} export {run} --to saelens --out {run}-saelens"""
