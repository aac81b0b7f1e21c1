"""Results on disk, for the browser: contrasts, diffs, monitors and their tests, steering experiments.

Each is checked against the form that its page relies on, and against the index: whatever the page links to is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qwenscope.analysis.detector import Detector
from qwenscope.analysis.monitor import score_rows
from qwenscope.analysis.result_forms import FORMS, Head
from qwenscope.errors import FormatError, reason
from qwenscope.features.browser.results import Result
from qwenscope.features.store import Index, MissingLatentError
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target

LARGEST = 16 << 20
"""Bytes of a result; one of fifty latents with their conversations has a tenth of a megabyte."""
_MONITOR = "monitor.json"
_FILES = ("contrast.json", "experiment.json", _MONITOR)
_HEAD = TypeAdapter(Head)


def read_results(paths: Sequence[Path], index: Index) -> list[Result]:
    """Results to be shown beside an index.

    Args:
        paths: each a file that `--out` named, or a folder.
        index: of the suite that they are about.

    Raises:
        FormatError: one is none, damaged, of another suite, or has another one's name.
    """
    results: dict[str, Result] = {}
    for path in paths:
        result = _read(path, index)
        if result.name in results:
            raise FormatError(f"two results are called {result.name}; rename one")
        results[result.name] = result
    return list(results.values())


def _read(path: Path, index: Index) -> Result:
    file = path
    if path.is_dir():
        there = [path / name for name in _FILES if (path / name).is_file()]
        if len(there) != 1:
            raise FormatError(f"{path} is no result: it holds {'more than one' if there else 'none'} of {_listed()}")
        (file,) = there
    detector = Detector.load(file.parent) if file.name == _MONITOR else None
    value = _checked(_text(file) if detector is None else _fitted(detector), file)
    _check_suite(value, index, file)
    name = path.resolve().name if path.is_dir() else path.stem
    return Result(name, value, _summary(value), None if detector is None else Scorer(detector))


def _listed() -> str:
    return f"{', '.join(_FILES[:-1])} and {_FILES[-1]}"


def _text(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            text = opened.read(LARGEST + 1)
    except OSError as error:
        raise FormatError(f"{file} cannot be read ({reason(error)})") from None
    if len(text) > LARGEST:
        raise FormatError(f"{file} is no result: it has more than {LARGEST:,} bytes")
    return text


def _fitted(detector: Detector) -> str:
    """What a monitor's page shows, as JSON."""
    about = {**detector.about, "kind": "monitor", "target": "", "latents": detector.listed()}
    about |= {"saes": {about["sae"]: about["sae_digest"]}, "pool": detector.pool, "roles": detector.scope.roles}
    return json.dumps(about | {"fpr": detector.fpr, "threshold": detector.threshold})


def _checked(text: str | bytes, file: Path) -> dict[str, Any]:
    """The part of a result that its page relies on."""
    try:
        kind = _HEAD.validate_json(text, strict=True)["kind"]
        if kind not in FORMS:
            raise FormatError(f"{file} is a result of a kind that is not known here: {kind!r}")
        value: dict[str, Any] = FORMS[kind].validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = f"{where}: {first['msg']}" if where else first["msg"]
        raise FormatError(f"{file} is no result that can be shown ({said}); make it again") from None
    return value


def _check_suite(value: Mapping[str, Any], index: Index, file: Path) -> None:
    """FormatError unless the index has the SAEs of a result, with the same weights, and its latents."""
    whose = f"{file} is about another suite than {index.folder}"
    for id, digest in value["saes"].items():
        if id not in index.saes:
            raise FormatError(f"{whose}, which has no SAE {id}")
        if index.saes[id].get("digest", digest) != digest:  # an index may be older than digests
            raise FormatError(f"{whose}, whose {id} has other weights")
    try:
        for each in value["latents"]:
            index.check(each["sae"], each["latent"])
    except MissingLatentError as error:
        raise FormatError(f"{whose}: {error}") from None


def _summary(value: Mapping[str, Any]) -> str:
    """One line."""
    kind = value["kind"]
    if kind == "monitor":
        return f"{len(value['latents']):,} latents, {value['fpr']:.2%} false positives stated"
    if kind == "monitor test":
        return f"{len(value['slices'])} slices, {value['fpr']:.2%} false positives stated"
    if kind == "scenarios":
        return f"{len(value['traits'])} traits, {value['scenarios']:,} scenarios, {value['runs']:,} runs"
    return f"{value['found']:,} of {value['tested']:,} latents found"


class Scorer:
    """A monitor for the browser's language model."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self._checked_for: LanguageModel | None = None

    def __call__(self, target: Target, lm: LanguageModel, rows: Sequence[Any], tokens: bool) -> list[dict[str, Any]]:
        """The lines of `monitor score`, of rows of conversations.

        Raises:
            FormatError: the monitor is for another SAE or model.
            CorpusError: a row is no conversation.
        """
        if self._checked_for is not lm:
            self._detector.sae(target)
            self._detector.check_model(lm)
            self._checked_for = lm
        named = ((f"conversations[{number}]", row) for number, row in enumerate(rows))
        return [scored.line(tokens=tokens) for scored in score_rows(self._detector, target, lm, named)]
