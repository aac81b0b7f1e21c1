"""What a release says about itself, read from its own files; a number that is missing is an error that names its key.

Nothing about the machine's owner goes out: host names, process ids and absolute paths stay behind in the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from pydantic import FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from qwenscope.corpus.hub import REPOSITORIES
from qwenscope.errors import FormatError, reason
from qwenscope.evaluation.compare import NUMBERS, SPECIAL
from qwenscope.files import public_name, read_json, read_object, write_json, write_text
from qwenscope.recipe import Recipe, SourceRecipe, load_recipe


@dataclass(frozen=True)
class Facts:
    """The files of a release folder that its card is written from."""

    recipe: Recipe
    evaluation: dict[str, Any]
    """{"saes": {sae_id: {split: numbers}}, ...}, every number of `NUMBERS` present."""
    run: dict[str, Any]
    """Machine, versions, commit and revisions."""
    privacy: dict[str, Any] | None
    """The corpus report, where the run left one."""
    suite: dict[str, Any]
    """The release's own config.json."""

    @property
    def splits(self) -> list[str]:
        """Splits that were measured, in the order of the file."""
        cells = self.evaluation["saes"].values()
        return list(dict.fromkeys(split for splits in cells for split in splits))

    @property
    def datasets(self) -> list[str]:
        """Hub datasets that the corpus was read from."""
        return list(dict.fromkeys(repo for source in self.recipe.corpus.sources if (repo := dataset_of(source))))


class _Device(TypedDict):
    name: str
    memory_bytes: int


class _Processor(TypedDict):
    cores: int
    torch_threads: int


class _Machine(TypedDict, total=False):
    versions: dict[str, str]
    devices: list[_Device]
    cpu: _Processor


class _Revisions(TypedDict, total=False):
    model: str | None
    corpus: dict[str, str] | None


class _RunRecord(TypedDict, total=False):
    """run.json, of which the card tells."""

    machine: _Machine
    revisions: _Revisions
    commit: str | None


class _SourceReport(TypedDict):
    conversations: int
    tokens: int
    truncated: int
    dropped: dict[str, int]


class _CorpusReport(TypedDict):
    """privacy_report.json, likewise."""

    sources: dict[str, _SourceReport]
    scrubbed: dict[str, int]


class _Auroc(TypedDict):
    auroc: FiniteFloat


_Few = TypedDict("_Few", {"1": _Auroc, "4": _Auroc, "16": _Auroc})


class _All(TypedDict):
    all: _Auroc


_Probing = TypedDict("_Probing", {"latents": _Few, "frozen decoder": _Few, "rows": _All})


class _Share(TypedDict):
    share: FiniteFloat | None


class _Probed(TypedDict):
    probing: _Probing
    absorption: NotRequired[dict[str, dict[str, _Share]]]
    mean_over_std: NotRequired[FiniteFloat]


class _Usefulness(TypedDict):
    """The key `usefulness` of evaluation.json, likewise."""

    conversations: int
    seeds: int
    labels: dict[str, int]
    tokens: _Auroc
    saes: dict[str, _Probed]


def read_record(path: Path, form: type) -> dict[str, Any]:
    """A file of a run that holds an object of this form.

    Raises:
        FormatError: it does not; names file and key.
    """
    value = read_object(path)
    try:
        _check_form(value, form, path, "restore it")
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # NaN, half a surrogate pair
        raise FormatError(f"{path} holds what JSON cannot ({reason(error)}); restore it") from None
    return value


def _check_form(value: Any, form: type, path: Path, cure: str, *key: str) -> None:
    """FormatError naming the first part of `value`, which stands under `key` in the file, that is not of the form."""
    try:
        TypeAdapter(form).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in (*key, *first["loc"]))
        raise FormatError(f"{path}: {name}: {first['msg']}; {cure}") from None


def read_facts(folder: Path) -> Facts:
    """Read and check the files of a release folder.

    Raises:
        FormatError: a file is missing or damaged, or a measured number is missing; names file and key.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    evaluation = read_json(folder / "evaluation.json")
    check_numbers(evaluation, recipe, folder / "evaluation.json")
    privacy = folder / "privacy_report.json"
    return Facts(
        recipe,
        evaluation,
        read_record(folder / "run.json", _RunRecord),
        read_record(privacy, _CorpusReport) if privacy.is_file() else None,
        read_object(folder / "config.json"),
    )


def check_numbers(evaluation: Any, recipe: Recipe, path: Path) -> None:
    """FormatError naming the first number that the card needs and `evaluation` lacks."""
    cure = "run `qwenscope evaluate` again"
    saes = evaluation.get("saes") if isinstance(evaluation, dict) else None
    if not isinstance(saes, dict):
        raise FormatError(f"{path}: saes is missing; {cure}")
    if extra := sorted(set(saes) - set(recipe.hook_points)):
        raise FormatError(f"{path}: saes.{extra[0]} is none of the recipe's SAEs; {cure}")
    for sae_id in recipe.hook_points:
        splits = saes.get(sae_id)
        if not isinstance(splits, dict) or not splits:
            raise FormatError(f"{path}: saes.{sae_id} is missing; {cure}")
        for split, cell in splits.items():
            for key in (*NUMBERS, SPECIAL):
                value = cell.get(key) if isinstance(cell, dict) else None
                absent = key == SPECIAL and isinstance(cell, dict) and key in cell and value is None
                if not absent and not _is_number(value):
                    raise FormatError(f"{path}: saes.{sae_id}.{split}.{key} is {_shown(value)}; {cure}")
    if "usefulness" in evaluation:
        _check_form(evaluation["usefulness"], _Usefulness, path, cure, "usefulness")
        if lacking := sorted(recipe.hook_points.keys() - evaluation["usefulness"]["saes"].keys()):
            raise FormatError(f"{path}: usefulness.saes.{lacking[0]} is missing; {cure}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value!r}, no number"


def dataset_of(source: SourceRecipe) -> str | None:
    """The Hub dataset of a source, or None for local files and the packaged generator."""
    if source.path is not None or source.generated:
        return None
    return source.repo or REPOSITORIES[source.name]


def public_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json says of the training that others need: machine, versions, commit, revisions, precision, seed."""
    machine = run.get("machine", {})
    kept = {key: run[key] for key in ("seed", "fingerprint", "commit", "revisions", "precision") if key in run}
    return kept | {
        "machine": {
            key: machine[key] for key in ("python", "versions", "devices", "cpu", "memory_bytes") if key in machine
        }
    }


def public_evaluation(evaluation: dict[str, Any]) -> dict[str, Any]:
    """evaluation.json with the language model's public name."""
    model = evaluation.get("language_model")
    if not isinstance(model, dict) or "name" not in model:
        return evaluation
    return evaluation | {"language_model": model | {"name": public_name(str(model["name"]))}}


def copy_facts(run: Path, out: Path, recipe: Recipe) -> None:
    """Write the public versions of a run's files into the release folder `out`."""
    evaluation = read_json(run / "evaluation.json")
    check_numbers(evaluation, recipe, run / "evaluation.json")
    write_json(out / "evaluation.json", public_evaluation(evaluation))
    write_text(out / "recipe.yaml", recipe.published().to_yaml())
    record = read_record(run / "run.json", _RunRecord) if (run / "run.json").is_file() else {}
    write_json(out / "run.json", public_run(record))
    if (run / "privacy_report.json").is_file():
        write_json(out / "privacy_report.json", read_record(run / "privacy_report.json", _CorpusReport))
