"""Build a release folder from a complete, evaluated run; it appears whole or not at all.

README.md (card), config.json (index), <sae_id>/{config.json, weights.safetensors}, saelens/<sae_id>/, evaluation.json,
evaluation.parquet, metrics.parquet, quality.svg, recipe.yaml, run.json, privacy_report.json, notebook.ipynb,
SHA256SUMS.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwenscope.checksums import CHECKSUMS_FILE, read_checksums, verify_folder, write_checksums
from qwenscope.errors import FormatError
from qwenscope.files import folder_aside, public_name, read_json, read_object, whole_folder, write_json, write_text
from qwenscope.hub import check_repo_id
from qwenscope.lm.sites import Site
from qwenscope.opening import check_size
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.release.card import example_sae, model_card, quality_plots
from qwenscope.release.facts import copy_facts, read_facts
from qwenscope.release.notebook import notebook
from qwenscope.release.parquet import write_evaluation, write_training
from qwenscope.sae.activation import described
from qwenscope.sae.formats import export_sae
from qwenscope.sae.loading import iterate_suite
from qwenscope.sae.sae import SAE

_UNIT_TOLERANCE = 1e-5


def release(run: Path, out: Path, *, repo: str | None = None) -> None:
    """Build the release folder `out` of the run folder `run`.

    Args:
        run: a run whose state is complete and that was evaluated.
        out: a new or empty folder; one that holds this very release already is left as it is (and bound to `repo`).
        repo: `org/name` it will be pushed to, for the card's usage section; None writes it for the folder itself.

    Raises:
        FormatError: the run is not complete, not evaluated, a measured number is missing, or an SAE is damaged;
            names file and key. Nothing is left at `out`.
        ResourceError: the disk is full.
    """
    _check_complete(run)
    if (out / CHECKSUMS_FILE).is_file():
        _check_same(run, out)
        if repo is not None:
            bind(out, repo)
        return
    with whole_folder(out) as temporary:
        _build(run, temporary)
        bind(temporary, repo)


def bind(folder: Path, repo: str | None) -> None:
    """Write what names the repository, and what is drawn: config.json's `repo`, README.md, quality.svg, notebook.ipynb;
    then the checksums.

    A pure function of the folder's other files and `repo`: binding twice changes nothing.

    Raises:
        FormatError: a file of the folder is missing or damaged, or `repo` is no `org/name`.
    """
    if repo is not None:
        check_repo_id(repo)
    write_json(folder / "config.json", read_object(folder / "config.json") | {"repo": repo})
    facts = read_facts(folder)
    write_text(folder / "README.md", model_card(facts))
    write_text(folder / "quality.svg", quality_plots(facts))
    model = str(facts.suite["language_model"]["name"])
    write_json(folder / "notebook.ipynb", notebook(repo or ".", example_sae(facts), model))
    write_checksums(folder)


def _build(run: Path, out: Path) -> None:
    """Write everything that does not name the repository."""
    recipe = load_recipe(run / "recipe.yaml")
    if differences := [name for name, point in recipe.hook_points.items() if point.is_difference]:
        raise FormatError(f"{differences[0]} reads a difference of two models; a release is of one: share {run}")
    copy_facts(run, out, recipe)
    write_json(out / "config.json", _index(run, out, recipe) | {"saes": _copy_saes(run, out, recipe)})
    write_evaluation(read_json(out / "evaluation.json"), out / "evaluation.parquet")
    if (run / "metrics.jsonl").is_file():
        write_training(run / "metrics.jsonl", out / "metrics.parquet")


def _check_same(run: Path, out: Path) -> None:
    """FormatError unless `out` is, to the byte, what a build from `run` gives: a release that is to be pushed again."""
    verify_folder(out)
    with folder_aside(out) as folder:
        _build(run, folder)
        bind(folder, read_object(out / "config.json").get("repo"))
        if read_checksums(folder) != read_checksums(out):
            raise FormatError(f"{out} holds another release than {run} gives; choose another folder, or remove it")


def _check_complete(run: Path) -> None:
    if not (run / "recipe.yaml").is_file():
        raise FormatError(f"{run} holds no recipe.yaml; give a run folder")
    state = read_object(run / "status.json").get("state")
    if state != "complete":
        raise FormatError(f"{run} is {state!r}, not complete; go on with `qwenscope train --resume`")
    if not (run / "evaluation.json").is_file():
        raise FormatError(f"{run} has no evaluation.json; run `qwenscope evaluate {run}` first")


def _index(run: Path, out: Path, recipe: Recipe) -> dict[str, Any]:
    facts = read_object(out / "run.json")
    return {
        "library_name": "qwenscope",
        "architecture": " and ".join(dict.fromkeys(point.activation for point in recipe.hook_points.values())),
        "format_version": 1,
        "qwenscope": version("qwenscope"),
        "commit": facts.get("commit"),
        "repo": None,
        "language_model": {
            "name": public_name(recipe.lm.model),
            "revision": facts.get("revisions", {}).get("model") or recipe.lm.revision,
        },
        "training_metrics": (run / "metrics.jsonl").is_file(),
    }


def _copy_saes(run: Path, out: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """Write every SAE in both layouts, after the checks a reader would make; returns their index."""
    index = {}
    for sae_id, sae in iterate_suite(run):
        if sae_id not in recipe.hook_points:
            raise FormatError(f"{run / 'saes' / sae_id} is none of the recipe's SAEs; remove it")
        _check_unit_norm(sae_id, sae)
        point = recipe.hook_points[sae_id]
        check_size(run / "saes" / sae_id, sae, point)
        sae.config |= {"sae_id": sae_id, **Site(point.site).described(), "model": public_name(recipe.lm.model)}
        sae.save(out / sae_id)
        export_sae(sae, sae_id, "saelens", out / "saelens", run)
        index[sae_id] = {
            "sae_id": sae_id,
            **Site(point.site).described(),
            "kind": point.kind,
            "hidden_dim": sae.hidden_dim,
            "dict_size": sae.dict_size,
            "k": sae.k,
            **described(point.activation),
        }
    if missing := [sae_id for sae_id in recipe.hook_points if sae_id not in index]:
        raise FormatError(f"{run / 'saes' / missing[0]} is missing; the run is not whole")
    return [index[sae_id] for sae_id in recipe.hook_points]


def _check_unit_norm(sae_id: str, sae: SAE) -> None:
    off = float((sae.decoder.weight.detach().norm(dim=0) - 1).abs().max())
    if off > _UNIT_TOLERANCE:
        raise FormatError(
            f"{sae_id}: a decoder column's norm is off 1 by {off:.2g}; release SAEs that qwenscope trained"
        )
