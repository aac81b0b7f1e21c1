"""Parquet beside the SQLite file: one row per latent, one row per example; written block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwenscope.features.describe import Latent, Texts
from qwenscope.features.statistics import BEFORE
from qwenscope.features.token_text import alone

_STRINGS = pa.list_(pa.string())
LATENTS = pa.schema(
    [
        ("sae_id", pa.string()),
        ("latent", pa.int32()),
        ("density", pa.float64()),
        ("max", pa.float32()),
        ("mean", pa.float32()),
        ("peaks", _STRINGS),
        ("promoted", _STRINGS),
        ("suppressed", _STRINGS),
        ("neighbours", pa.list_(pa.int32())),
    ]
)
EXAMPLES = pa.schema(
    [
        ("sae_id", pa.string()),
        ("latent", pa.int32()),
        ("kind", pa.string()),
        ("tokens", _STRINGS),
        ("activations", pa.list_(pa.float32())),
    ]
)


class ParquetFiles:
    """Writers of `latents.parquet` and `examples.parquet` in a folder."""

    def __init__(self, folder: Path, texts: Texts) -> None:
        self._texts = texts
        self._latents = pq.ParquetWriter(folder / "latents.parquet", LATENTS, compression="zstd")
        self._examples = pq.ParquetWriter(folder / "examples.parquet", EXAMPLES, compression="zstd")

    def __enter__(self) -> ParquetFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._latents.close()
        self._examples.close()

    def add(self, sae_id: str, block: list[Latent]) -> None:
        """Append the latents of a block and their examples."""
        rows = [self._latent(sae_id, latent) for latent in block]
        self._latents.write_table(pa.Table.from_pylist(rows, schema=LATENTS))
        examples = [self._example(sae_id, latent.number, e) for latent in block for e in latent.detail["examples"]]
        self._examples.write_table(pa.Table.from_pylist(examples, schema=EXAMPLES))

    def _latent(self, sae_id: str, latent: Latent) -> dict[str, Any]:
        words = self._texts.vocabulary
        return {
            "sae_id": sae_id,
            "latent": latent.number,
            **{name: latent.columns[name] for name in ("density", "max", "mean", "peaks")},
            "promoted": [alone(words[token]) for token, _ in latent.detail["promoted"]],
            "suppressed": [alone(words[token]) for token, _ in latent.detail["suppressed"]],
            "neighbours": [other for other, _ in latent.detail["neighbours"]],
        }

    def _example(self, sae_id: str, latent: int, example: list[Any]) -> dict[str, Any]:
        kind, address, offsets, values = example
        low, tokens = self._texts.window(address)
        activations = [0.0] * len(tokens)
        for offset, value in zip(offsets, values, strict=True):
            activations[address - BEFORE + offset - low] = value
        return {"sae_id": sae_id, "latent": latent, "kind": kind, "tokens": tokens, "activations": activations}
