"""Neuronpedia's bulk-import layout: `v1/<model>/<source>/` with model, source and gzipped batches of features.

Written from the weights alone: one feature per latent with its nearest latents by decoder cosine, and the records that
link it to model, layer and weights; release/neuronpedia.py adds what a feature index knows. https://github.com/hijohnnylin/neuronpedia

Legend: N latents, R rows of a block.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from qwenscope.errors import FormatError
from qwenscope.files import atomic_path
from qwenscope.sae.files import join_below
from qwenscope.sae.sae import SAE

BATCH = 1024  # features per file, as in Neuronpedia's own exports
_NEAREST = 10
_CREATOR = "clkht01d40000jv08hvalcvly"  # the default creator of Neuronpedia's public exports


def write(
    sae: SAE, sae_id: str, exports: Path, describe: Callable[[int], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Write one SAE below `exports/v1`.

    Args:
        sae: the SAE.
        sae_id: its id.
        exports: folder of the export.
        describe: further keys of a latent's feature record, by its number.

    Returns:
        The keys that name model, source and creator in every record.

    Raises:
        FormatError: the SAE's configuration does not say of which model and layer it is, or they make no folder's name.
    """
    config = sae.config
    if "model" not in config or "layer" not in config:
        raise FormatError(f"{sae_id}: Neuronpedia needs the keys model and layer in its {sorted(config)}; add them")
    model, source_set = str(config["model"]).rsplit("/", 1)[-1].lower(), f"qwenscope-{sae_id}"
    source = f"{config['layer']}-{source_set}"
    folder = join_below(exports, "v1", model, source)
    (folder / "features").mkdir(parents=True)
    owner = {"modelId": model, "creatorId": _CREATOR}
    write_lines(folder / "model.jsonl", [{"id": model, "creatorId": _CREATOR, "displayName": config["model"]}])
    release = {"name": "qwenscope", "description": "TopK SAEs trained with qwenscope", "creatorName": "qwenscope"}
    write_lines(folder / "release.jsonl", [{**release, "creatorId": _CREATOR}])
    kind, layer = type(sae.activation).__name__, config["layer"]
    about = f"{kind}, {sae.dict_size:,} latents, k={sae.k}, residual stream after layer {layer}"
    write_lines(
        folder / "sourceset.jsonl",
        [{**owner, "name": source_set, "description": about, "releaseName": "qwenscope", "creatorName": "qwenscope"}],
    )
    write_lines(
        folder / "source.jsonl", [{**owner, "id": source, "setName": source_set, "hfFolderId": f"saelens/{sae_id}"}]
    )
    named = {**owner, "layer": source}
    shared = {"sourceSetName": source_set, "hookName": f"blocks.{config['layer']}.hook_resid_post", "hasVector": False}
    for number, features in enumerate(batches(_features(sae, named | shared, describe))):
        write_lines(folder / "features" / f"batch-{number}.jsonl.gz", features)
    return named


def _features(
    sae: SAE, shared: dict[str, Any], describe: Callable[[int], dict[str, Any]] | None
) -> Iterator[dict[str, Any]]:
    """One record per latent."""
    directions_ND: Tensor = normalize(sae.decoder.weight.detach().T, dim=1)
    nearest = min(_NEAREST, sae.dict_size)
    for start in range(0, sae.dict_size, BATCH):
        cosine_RN = directions_ND[start : start + BATCH] @ directions_ND.T
        values, indices = (found.tolist() for found in cosine_RN.topk(nearest, dim=1))
        for row in range(len(values)):
            record = {
                **shared,
                "index": str(start + row),
                "topkCosSimIndices": indices[row],
                "topkCosSimValues": [round(value, 5) for value in values[row]],
            }
            yield record | (describe(start + row) if describe else {})


def batches(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """`BATCH` records at a time."""
    remaining = iter(records)
    while batch := list(islice(remaining, BATCH)):
        yield batch


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """JSON lines, gzipped (without a time stamp, so that equal exports are equal files) if the name ends in .gz."""
    data = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records).encode()
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)
