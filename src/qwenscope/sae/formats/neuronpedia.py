"""Neuronpedia's bulk-import layout: `v1/<model>/<source>/` with model, source and gzipped batches of features.

Written from the weights alone: one feature per latent with its nearest latents by decoder cosine, and the records that
link it to model, layer and weights; release/neuronpedia.py adds what a feature index knows. https://github.com/hijohnnylin/neuronpedia

Legend: N latents, R rows of a block.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from qwenscope.errors import FormatError
from qwenscope.files import atomic_path, public_name
from qwenscope.sae.files import join_below
from qwenscope.sae.formats.hooks import transformer_lens_name
from qwenscope.sae.sae import SAE

BATCH = 1024  # features per file, as in Neuronpedia's own exports
_NEAREST = 10
_CREATOR = "clkht01d40000jv08hvalcvly"  # the default creator of Neuronpedia's public exports


def write(
    sae: SAE,
    sae_id: str,
    exports: Path,
    suite: str | Path,
    layers: int | None = None,
    describe: Callable[[int], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write one SAE below `exports/v1`.

    Args:
        sae: the SAE.
        sae_id: its id.
        exports: folder of the export.
        suite: the folder or repository that it is of; its name becomes the release's.
        layers: of the language model; None: unknown, and taken for as many as the SAE's own proves.
        describe: further keys of a latent's feature record, by its number.

    Returns:
        The keys that name model, source and creator in every record.

    Raises:
        FormatError: the SAE's configuration does not say of which model and layer it is, or they make no folder's name.
    """
    config = sae.config
    if "model" not in config or "layer" not in config:
        raise FormatError(f"{sae_id}: Neuronpedia needs the keys model and layer in its {sorted(config)}; add them")
    owner, _, name = public_name(config["model"]).rpartition("/")
    model, release = name.lower(), _release_name(suite)
    source_set = f"{release}-{sae_id}-{_digest(sae)}"
    source = f"{config['layer']}-{source_set}"
    folder = join_below(exports, "v1", model, source)
    (folder / "features").mkdir(parents=True)
    where = transformer_lens_name(config)
    about = f"{type(sae.activation).__name__}, {sae.dict_size:,} latents, k={sae.k}, {where or config['site']}"
    by = {"creatorName": "qwenscope", "urls": []}
    size = {"layers": config["layer"] + 1 if layers is None else layers, "neuronsPerLayer": 0}  # none are shown
    records: dict[str, dict[str, Any]] = {
        "model": {"id": model, "displayName": name, "owner": owner or "unknown", **size},
        "release": {**by, "name": release, "description": f"SAEs of {release}, trained with qwenscope"},
        "sourceset": {**by, "modelId": model, "name": source_set, "description": about, "releaseName": release},
        "source": {"modelId": model, "id": source, "setName": source_set, "hfFolderId": f"saelens/{sae_id}"},
    }
    for file, record in records.items():
        write_lines(folder / f"{file}.jsonl", [{**record, "creatorId": _CREATOR, "visibility": "PUBLIC"}])
    named = {"modelId": model, "creatorId": _CREATOR, "layer": source}
    shared = {"sourceSetName": source_set, "hookName": where, "hasVector": False}
    for number, features in enumerate(batches(_features(sae, named | shared, describe))):
        write_lines(folder / "features" / f"batch-{number}.jsonl.gz", features)
    return named


def _release_name(suite: str | Path) -> str:
    """A suite's folder or repository by its own name; a run's is the run's."""
    path = Path(suite).resolve()
    name = path.parent.name if path.name == "saes" else path.name
    return re.sub(r"[^a-z0-9_.]+", "-", name.lower()).strip("-_.")[:64] or "qwenscope"


def _digest(sae: SAE) -> str:
    """Eight hex digits of the weights: the importer skips what has a known name, so that no two SAEs may share one."""
    digest = hashlib.sha256()
    for value in sae.state_dict().values():
        digest.update(value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


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
