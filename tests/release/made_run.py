"""A complete, evaluated run made by hand: small exact SAEs and an evaluation.json with the contract's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exact_saes import DICT_SIZE, K, exact_sae

from qwenscope.evaluation.compare import NUMBERS
from qwenscope.recipe import Recipe

POINTS = {
    "sae_delta_mid_pos1": (21, "deltanet"),
    "sae_delta_mid": (22, "deltanet"),
    "sae_attn_mid": (23, "attention"),
}


def recipe(**lm: Any) -> Recipe:
    """Three hook points of the published suite, at the size of `exact_sae`."""
    return Recipe.model_validate(
        {
            "lm": {"model": "Qwen/Qwen3.5-35B-A3B", "revision": "0123abc", "dtype": "bfloat16"} | lm,
            "hook_points": {
                sae_id: {"layer": layer, "kind": kind, "dict_size": DICT_SIZE, "k": K, "lr": 1e-5}
                for sae_id, (layer, kind) in POINTS.items()
            },
            "corpus": {
                "sources": [
                    {"name": "ultrachat", "weight": 0.35},
                    {"name": "wildchat", "weight": 0.35},
                    {"name": "tool_use", "weight": 0.3},
                ]
            },
            "training": {"tokens": 200_000_000, "batch_size": 4096, "warmup_steps": 1000},
        }
    )


def number(sae: int, split: int, key: int) -> float:
    """A different figure for every cell of the tables."""
    return round(0.1 + 0.01 * key + 0.001 * split + 0.0001 * sae, 4)


def evaluation() -> dict[str, Any]:
    """evaluation.json with every number of the contract."""
    cells: dict[str, Any] = {}
    for i, sae_id in enumerate(POINTS):
        for j, split in enumerate(("chat", "tool_use")):
            cell: dict[str, Any] = {key: number(i, j, place) for place, key in enumerate(NUMBERS)}
            cells.setdefault(sae_id, {})[split] = cell | {
                "tokens": 100_000 + j,
                "mse_special_tokens": None if j else 0.5,
            }
    return {"saes": cells}


def privacy_report() -> dict[str, Any]:
    """privacy_report.json as a run writes it."""
    counts = {"rows_in": 1000, "rows_kept": 900, "conversations": 900, "truncated": 12, "tokens": 1_234_567}
    sources = {name: {**counts, "share": 1 / 3, "dropped": {}} for name in ("ultrachat", "wildchat", "tool_use")}
    sources["wildchat"]["dropped"] = {"country": 77, "toxic": 23}
    return {"sources": sources, "scrubbed": {"email": 41}, "tokens": 3 * 1_234_567}


def make_run(folder: Path, made_by: Recipe | None = None) -> Path:
    """Write the run and return its folder."""
    made_by = made_by or recipe()
    for seed, (sae_id, (layer, kind)) in enumerate(POINTS.items()):
        exact_sae(seed, sae_id=sae_id, layer=layer, kind=kind, model=made_by.lm.model).save(folder / "saes" / sae_id)
    (folder / "recipe.yaml").write_text(made_by.to_yaml())
    write = {
        "status.json": {"state": "complete", "tokens_trained": 200_000_000, "pid": 4242, "host": "my-secret-host"},
        "evaluation.json": evaluation(),
        "privacy_report.json": privacy_report(),
        "run.json": {
            "sessions": [{"pid": 4242, "host": "my-secret-host"}],
            "seed": 42,
            "commit": "c" * 40,
            "machine": {
                "python": "3.12.1",
                "platform": "Linux-my-secret-host",
                "versions": {"torch": "2.11.0"},
                "devices": [{"name": "NVIDIA H200", "memory_bytes": 150 * 2**30}] * 2,
            },
            "revisions": {
                "model": "f" * 40,
                "corpus": {"ultrachat": "a" * 40, "wildchat": "b" * 40, "tool_use": "gen"},
            },
        },
    }
    for name, value in write.items():
        (folder / name).write_text(json.dumps(value))
    lines = [
        {"step": step, "tokens": 10 * step, "saes": {name: {"fvu": 1 / step} for name in POINTS}} for step in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
