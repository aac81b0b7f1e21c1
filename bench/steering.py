"""Where the strength slider starts: at a strength that changes the text and keeps it, latent by latent.

    python bench/steering.py TARGET [--latents 20] [--tokens 40] [--prompt TEXT]

TARGET is a complete run, a release or what else `open_target` takes. Latents are drawn by lot over all SAEs; each is
measured as *Measure strengths* does (`text_range`, from the assistant's turn on, in shares of the stream's norm).
Beside each stands a random direction under the same rule. Prints a line per latent and one JSON object: in how many
the start changes at least one token and keeps the KL within KL_BOUND, and whether the text at the start is a text.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from qwenscope.features.continuation import answer_start, prompt_tokens
from qwenscope.features.steering import Steering
from qwenscope.features.steering_range import KL_BOUND, Range, text_range
from qwenscope.opening import open_target
from qwenscope.seeds import generator


def main() -> None:
    """Draw, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--latents", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--prompt", default="Tell me about your day.")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    target = open_target(chosen.target)
    lm = target.language_model()
    random = generator(0, "bench steering")
    latents = [(sae_id, latent) for sae_id, sae in target.saes.items() for latent in range(sae.dict_size)]
    ids, start = prompt_tokens(lm, chosen.prompt), answer_start(lm, chosen.prompt)
    found: dict[str, list[dict[str, Any]]] = {"latent": [], "random direction": []}
    for place in torch.randperm(len(latents), generator=random)[: chosen.latents].tolist():
        sae_id, latent = latents[place]
        push = Steering(target.targets[sae_id], sae=target.saes[sae_id], latent=latent, where=slice(start, None))
        noise = torch.randn(len(push.direction_D), generator=random, dtype=torch.float32)
        for name, steering in (("latent", push), ("random direction", replace(push, along=noise))):
            row = _row(text_range(lm, ids, steering, max_new_tokens=chosen.tokens))
            found[name].append({"sae": sae_id, "at": latent, **row})
            print(f"{name} {sae_id}/{latent}: {row}", flush=True)
    print(json.dumps({name: _summary(rows) for name, rows in found.items()}))


def _row(found: Range) -> dict[str, Any]:
    """What the slider starts at, and the first strength that changes anything."""
    start = next((trial for trial in found.trials if trial.strength == found.start), None)
    first = next((trial for trial in found.trials if trial.changed), None)
    return {
        "start": found.start,
        "kl": start and round(start.kl, 3),
        "is_text": start and start.is_text,
        "first": first and [first.strength, round(first.kl, 3), first.is_text],
        "trials": len(found.trials),
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    fit = [row for row in rows if row["start"] is not None and row["kl"] <= KL_BOUND]
    return {
        "latents": len(rows),
        "start changes the text within the bound": len(fit),
        "of these a text": sum(bool(row["is_text"]) for row in fit),
        "median strength": median(row["start"] for row in fit) if fit else None,
        "median KL": median(row["kl"] for row in fit) if fit else None,
    }


if __name__ == "__main__":
    main()
