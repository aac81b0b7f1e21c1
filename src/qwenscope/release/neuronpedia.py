"""Neuronpedia's bulk-import layout with what a feature index knows: density, logit effects, examples, explanations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from qwenscope.errors import FormatError
from qwenscope.features.form import RULE_CLIENT
from qwenscope.features.store import Index
from qwenscope.files import whole_folder
from qwenscope.sae.formats import neuronpedia
from qwenscope.sae.formats.hooks import refuse_difference
from qwenscope.sae.loading import iterate_suite


def export_with_index(target: str | Path, index: Path, out: Path) -> None:
    """Write every SAE of a suite with features, activations and explanations, for Neuronpedia's importer.

    Args:
        target: what `load_suite` takes.
        index: folder made by `qwenscope index` from the same suite.
        out: a new or empty folder.

    Raises:
        FormatError: the index lacks an SAE of the suite or a latent of it, or is damaged.
    """
    known = Index(index)
    layers = len(known.meta["language_model"]["layers"])
    with whole_folder(out) as temporary:
        for sae_id, sae in iterate_suite(target):
            if sae_id not in known.saes:
                raise FormatError(f"{index} does not know {sae_id}; build it from {target} with `qwenscope index`")
            refuse_difference(sae.config, sae_id, "neuronpedia")
            page = partial(known.latent, sae_id)
            named = neuronpedia.write(sae, sae_id, temporary, target, layers, partial(_described, known, sae_id))
            folder = temporary / "v1" / named["modelId"] / named["layer"]
            for kind, records in (("activations", _activations), ("explanations", _explanations)):
                rows = (row for latent in range(sae.dict_size) for row in records(page(latent), named))
                _write(folder / kind, rows)


def _write(folder: Path, records: Iterable[dict[str, Any]]) -> None:
    folder.mkdir()
    for number, batch in enumerate(neuronpedia.batches(records)):
        neuronpedia.write_lines(folder / f"batch-{number}.jsonl.gz", batch)


def _described(index: Index, sae_id: str, latent: int) -> dict[str, Any]:
    """Further keys of a feature record.

    Effects are logits above the vocabulary's mean, which no softmax sees; the index has them in standard deviations.

    Raises:
        FormatError: the index is of a version that did not keep that deviation.
    """
    page = index.latent(sae_id, latent)
    if "logit_spread" not in page:
        raise FormatError(f"{index.folder} has no logits of {sae_id}, latent {latent}; build it again")
    spread = page["logit_spread"]
    return {
        "frac_nonzero": page["density"],
        "maxActApprox": page["max"] if page["fired"] else 0.0,
        "pos_str": [token for token, _ in page["promoted"]],
        "pos_values": [score * spread for _, score in page["promoted"]],
        "neg_str": [token for token, _ in page["suppressed"]],
        "neg_values": [score * spread for _, score in page["suppressed"]],
        "freq_hist_data_bar_heights": page["histogram"]["counts"],
        "freq_hist_data_bar_values": _middles(page["histogram"]),
    }


def _middles(histogram: dict[str, Any]) -> list[float]:
    """The activation in the middle of each bin; bins are of equal width in the logarithm."""
    places = range(len(histogram["counts"]) + 1)
    edges = [2.0 ** (histogram["first"] + place / histogram["per_octave"]) for place in places]
    return [(low + high) / 2 for low, high in pairwise(edges)]


def _name(page: dict[str, Any], named: dict[str, Any]) -> str:
    """A latent's name among all models and suites: the importer skips records whose id it knows."""
    return f"{named['modelId']}-{named['layer']}-{page['latent']}"


def _activations(page: dict[str, Any], named: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One record per example in which the latent fires; ids are stable, so that equal exports are equal files."""
    firing = [example for example in page["examples"] if any(example["activations"])]
    for number, example in enumerate(firing):
        values = example["activations"]
        peak = max(range(len(values)), key=values.__getitem__)
        yield {
            **named,
            "id": f"{_name(page, named)}-{number}",
            "index": str(page["latent"]),
            "tokens": example["tokens"],
            "values": values,
            "maxValue": values[peak],
            "maxValueTokenIndex": peak,
            "minValue": min(values),
        }


def _explanations(page: dict[str, Any], named: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The latent's explanation, if someone wrote one: a label by rule says no more than the records of a latent do."""
    if page["explanation"] and page["explanation"].get("client") != RULE_CLIENT:
        yield {
            "id": _name(page, named),
            "modelId": named["modelId"],
            "layer": named["layer"],
            "index": str(page["latent"]),
            "authorId": named["creatorId"],
            "description": page["explanation"]["label"],
        }
