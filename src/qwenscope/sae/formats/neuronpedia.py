"""Neuronpedia's bulk-import layout: `v1/<model>/<source>/` with model, source and gzipped batches of features.

Written from the weights alone: one feature per latent with its nearest latents by decoder cosine, and the records that
link it to model, layer and weights. https://github.com/hijohnnylin/neuronpedia

Legend: N latents, R rows of a block.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from qwenscope.errors import FormatError
from qwenscope.files import atomic_path
from qwenscope.sae.topk import TopKSAE

BATCH = 1024  # features per file, as in Neuronpedia's own exports
_NEAREST = 10
_CREATOR = "clkht01d40000jv08hvalcvly"  # the default creator of Neuronpedia's public exports


def write(sae: TopKSAE, sae_id: str, exports: Path) -> None:
    """Write one SAE below `exports/v1`.

    Raises:
        FormatError: the SAE's configuration does not say of which model and layer it is.
    """
    config = sae.config
    if "model" not in config or "layer" not in config:
        raise FormatError(f"{sae_id}: Neuronpedia needs the keys model and layer in its {sorted(config)}; add them")
    model, source_set = str(config["model"]).rsplit("/", 1)[-1].lower(), f"qwenscope-{sae_id}"
    source = f"{config['layer']}-{source_set}"
    folder = exports / "v1" / model / source
    (folder / "features").mkdir(parents=True)
    owner = {"modelId": model, "creatorId": _CREATOR}
    write_lines(folder / "model.jsonl", [{"id": model, "creatorId": _CREATOR, "displayName": config["model"]}])
    release = {"name": "qwenscope", "description": "TopK SAEs trained with qwenscope", "creatorName": "qwenscope"}
    write_lines(folder / "release.jsonl", [{**release, "creatorId": _CREATOR}])
    about = f"TopK, {sae.dict_size:,} latents, k={sae.k}, residual stream after layer {config['layer']}"
    write_lines(
        folder / "sourceset.jsonl",
        [{**owner, "name": source_set, "description": about, "releaseName": "qwenscope", "creatorName": "qwenscope"}],
    )
    write_lines(
        folder / "source.jsonl", [{**owner, "id": source, "setName": source_set, "hfFolderId": f"saelens/{sae_id}"}]
    )
    named = {
        **owner,
        "layer": source,
        "sourceSetName": source_set,
        "hookName": f"blocks.{config['layer']}.hook_resid_post",
    }
    for number, features in enumerate(_batches(sae, named)):
        write_lines(folder / "features" / f"batch-{number}.jsonl.gz", features)


def _batches(sae: TopKSAE, named: dict[str, Any]) -> Iterable[list[dict[str, Any]]]:
    """Feature records, `BATCH` at a time."""
    directions_ND: Tensor = normalize(sae.decoder.weight.detach().T, dim=1)
    nearest = min(_NEAREST, sae.dict_size)
    for start in range(0, sae.dict_size, BATCH):
        cosine_RN = directions_ND[start : start + BATCH] @ directions_ND.T
        values, indices = (found.tolist() for found in cosine_RN.topk(nearest, dim=1))
        yield [
            {
                **named,
                "index": str(start + row),
                "hasVector": False,
                "topkCosSimIndices": indices[row],
                "topkCosSimValues": [round(value, 5) for value in values[row]],
            }
            for row in range(len(values))
        ]


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """JSON lines, gzipped (without a time stamp, so that equal exports are equal files) if the name ends in .gz."""
    data = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records).encode()
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)
