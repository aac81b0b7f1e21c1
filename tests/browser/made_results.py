"""A result of every kind for the planted index, as the analysis writes them; the monitor among them is a real one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from planted_suite import HOSTILE, PLANTED, PLANTED_LATENT, WORDS

from qwenscope.analysis.monitor import fit
from qwenscope.features.store import Index
from qwenscope.files import write_json, write_text

SHARED = 40
"""The latent of sae_attn on the list that is exported."""
ODD_NAME = "<img src=x onerror=alert(1)>"
"""Of the diff's file."""
SIDES = {"positive": 0.9, "negative": 0.1}
LATENT = {"sae": "sae_delta", "latent": PLANTED_LATENT, "effect": 0.9, "interval": [0.8, 0.95], "q": 0.01}
OTHER = {"sae": "sae_attn", "latent": 41, "effect": -0.2, "interval": None, "q": 0.6}
OTHERS = [{**OTHER, "latent": latent} for latent in range(41, 54)]
CONTROL = {"auroc": 0.8, "interval": [0.7, 0.9], "balanced_accuracy": 0.75}
RATE = {"rate": 0.1, "interval": [0.05, 0.2], "count": 60}
FOUND: dict[str, Any] = {"tested": 400, "found": 1, "fdr": 0.05}
CONTRAST: dict[str, Any] = {
    "kind": "contrast",
    "conversations": {"positive": 24, "negative": 24},
    "paired": False,
    "pool": "max",
    **FOUND,
    "latents": [{**each, "adjusted_effect": 0.5, "auroc": 0.97, "active": SIDES} for each in (LATENT, *OTHERS)],
    "controls": {"": {"words": CONTROL}, "sae_delta": {"best latent": CONTROL, "probe on raw rows": CONTROL}},
    "confounds": {
        "length": {"positive": 54.1, "negative": 56.4, "p": 0.009},
        "roles": {"user": {**SIDES, "p": 0.01}},
        "language": {"positive": {"latin": 24}, "negative": {"latin": 24}, "p": None},
        "source": {"positive": {"here": 24}, "negative": {"there": 24}, "p": 0.001},
    },
}
DIFFERENT = {"group": 0, "rate": {"a": 0.02, "b": 0.0}, "active": {"a": 0.5, "b": 0.0}}
DIFF: dict[str, Any] = {
    "kind": "diff",
    "conversations": {"a": 24, "b": 30},
    "a": "a.jsonl",
    "b": "b.jsonl",
    **FOUND,
    "latents": [
        LATENT | DIFFERENT | {"conversations": [{"id": "0f", "text": f"order {HOSTILE}", "side": "a", "max": 66.4}]},
        OTHER | DIFFERENT | {"conversations": []},
    ],
}
CHECKPOINTS: dict[str, Any] = {
    **{key: value for key, value in DIFF.items() if key not in ("a", "b")},
    "kind": "checkpoints",
    "data": "chats.jsonl",
    "model": {"a": "base", "b": "tuned"},
    "latents": [
        LATENT
        | DIFFERENT
        | {
            "conversations": [{"id": "0f", "text": "order", "side": "b", "change": 0.02}],
            "tokens": [{"token": HOSTILE, "count": 9, "a": 1, "b": 8}],
        }
    ],
    "fvu": {"sae_delta": {"a": 0.1, "b": 0.2, "change": 0.1, "interval": [0.05, 0.15]}},
}
MEASURED = {"auroc": 0.9, "interval": [0.8, 1.0], "at": {"0.01": {"refused": "too few"}, "0.001": {"recall": 0.5}}}
STATED = {"false_positives": RATE, "recall": None, "holds": False}
TEST: dict[str, Any] = {
    "kind": "monitor test",
    "monitor": "monitor",
    "fpr": 0.1,
    "latents": [{"sae": "sae_delta", "latent": PLANTED_LATENT, "weight": 0.13}],
    "slices": {
        "all": {
            "conversations": {"positive": 30, "negative": 80},
            "stated": {**STATED, "recall": RATE, "holds": True},
            "by": {"monitor": MEASURED, "words": MEASURED},
        },
        "source elsewhere": {"conversations": {"positive": 0, "negative": 20}, "stated": STATED, "by": {}},
    },
}
CHANGED = {"rate": 0.5, "difference": 0.5, "interval": [0.2, 0.8]}
RUN: dict[str, Any] = {"trait": "asks", "kl": 0.5, "perplexity": 12.0, "checks": {"asks": CHANGED, "short": CHANGED}}
BEYOND = {**CHANGED, "beyond_random_difference": 0.3, "beyond_random_interval": None}
SCENARIOS: dict[str, Any] = {
    "kind": "scenarios",
    "runs": 40,
    "scenarios": 4,
    "repeats": 2,
    "traits": {"asks": "asks"},
    "latents": [{"sae": "sae_delta", "latent": PLANTED_LATENT, "trait": "asks"}],
    "unsteered": {"perplexity": 3.0, "checks": {"asks": 0.0, "short": 0.5}},
    "effects": [
        {**RUN, "arm": "prompt", "strength": None, "position": None},
        *(
            {**RUN, "arm": arm, "strength": strength, "position": "all", "checks": {"asks": told, "short": CHANGED}}
            for arm, told in (("steered", BEYOND), ("random direction", CHANGED))
            for strength in (0.1, 0.4)
        ),
    ],
    "matrix": {"strength": 0.4, "position": "all", "traits": {"asks": {"asks": 0.5, "short": -0.25}}},
}
MADE = {"contrast": CONTRAST, ODD_NAME: DIFF, "checkpoints": CHECKPOINTS, "test": TEST, "scenarios": SCENARIOS}


def of_suite(value: dict[str, Any], index: Index) -> dict[str, Any]:
    """A result as it would say of which suite it is."""
    digests = {sae_id: sae["digest"] for sae_id, sae in index.saes.items()}
    return copy.deepcopy(value) | {"target": index.meta["name"], "saes": digests}


def write_results(index: Index, folder: Path) -> list[Path]:
    """All of them: files and folders as `--out` leaves them."""
    places = {name: folder / f"{name}.json" for name in MADE}
    for name, file in (("contrast", "contrast.json"), ("scenarios", "experiment.json")):
        (folder / name).mkdir()
        places[name] = folder / name / file
    for name, value in MADE.items():
        write_json(places[name], of_suite(value, index))
    folders = [folder / name if (folder / name).is_dir() else places[name] for name in MADE]
    return [*folders, fit_monitor(index, folder)]


def fit_monitor(index: Index, folder: Path) -> Path:
    """A monitor for the planted word."""
    piles = {}
    for name, count in (("positive", 12), ("negative", 12), ("calibration", 20)):
        word = PLANTED.strip() if name == "positive" else "order"
        said = [f"{WORDS[n % 10]} {word} {WORDS[(n * 7 + len(name)) % 10]} {n}" for n in range(count)]
        rows = [{"messages": [{"role": "user", "content": text}]} for text in said]
        piles[name] = folder / f"{name}.jsonl"
        write_text(piles[name], "".join(json.dumps(row) + "\n" for row in rows))
    release = index.folder.parent / "release"
    fit(release, folder / "monitor", fpr=0.25, sae="sae_delta", latents=[PLANTED_LATENT], **piles)
    return folder / "monitor"
