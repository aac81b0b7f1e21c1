"""Search by example among the latents of nine SAEs: 20 planted ones, each sought by four texts that hold its word.

    python bench/find.py RUN DATA [--cases 20] [--tokens 30000]

RUN is a complete run (`qwenscope demo`), DATA conversations (`qwenscope data generate`). In a copy of its SAEs 20
latents, spread over all of them, are made to read one word each (least squares on half of the conversations, a
threshold above all other tokens); the copy is indexed. The texts are cut from the other half: up to 12 tokens before
the word, 6 after. Prints at which place the planted latent comes, alone and with the same texts without the word as
"but not these", and how many of the found latents fire on more than a fifth of all tokens. One JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenscope.features.find import find
from qwenscope.features.index import build_index
from qwenscope.features.store import Index
from qwenscope.lm.forward import site_rows
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target, open_target

BEFORE, AFTER, TEXTS = 12, 6, 4
COUNTS = range(12, 120)
"""How often a planted word stands in the half that it is fitted on."""


def main() -> None:
    """Plant, index, seek, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=30_000)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    target = open_target(chosen.run)
    lm = target.language_model(truncated=True)
    with target.conversations(lm.tokenizer, chosen.data) as stream:
        texts = [conversation.token_ids.astype(np.int64) for conversation in islice(stream, 120)]
    fitted, others = texts[::2], texts[1::2]
    words = _words(lm, fitted, others, chosen.cases)
    planted = _plant(target, lm, fitted, words)
    with tempfile.TemporaryDirectory() as folder:
        release = Path(folder) / "release"
        release.mkdir()
        (release / "recipe.yaml").write_text(target.recipe.to_yaml())
        for sae_id, sae in target.saes.items():
            sae.save(release / sae_id)
        build_index(release, Path(folder) / "index", data=chosen.data, tokens=chosen.tokens)
        print(json.dumps(_seek(Index(Path(folder) / "index"), target, lm, others, planted), indent=2))


def _words(lm: LanguageModel, fitted: list[Any], others: list[Any], cases: int) -> list[int]:
    """Tokens that are words, in both halves often enough."""
    here, there = (Counter(np.concatenate(half).tolist()) for half in (fitted, others))
    found = [
        token
        for token, count in here.items()
        if count in COUNTS and there[token] >= TEXTS and (text := lm.tokenizer.decode([token])).strip().isalpha()
        if text.startswith(" ") and len(text) > 4
    ]
    return sorted(random.Random(0).sample(sorted(found), cases))


@torch.no_grad()
def _plant(target: Target, lm: LanguageModel, texts: list[Any], words: list[int]) -> dict[int, tuple[str, int]]:
    """{word: (sae_id, latent)}; changes the SAEs of `target`."""
    ids, sites = list(target.saes), sorted(set(target.sites.values()))
    rows: dict[Any, list[Any]] = {site: [] for site in sites}
    for text in texts:
        for site, x_CTD in site_rows(lm, torch.from_numpy(text)[None], sites).items():
            rows[site].append(x_CTD[0, 1:].double())
    tokens_R = torch.from_numpy(np.concatenate([text[1:] for text in texts]))
    planted = {}
    for number, word in enumerate(words):
        sae_id = ids[number % len(ids)]
        sae, rows_RD = target.saes[sae_id], torch.cat(rows[target.sites[sae_id]])
        latent = (11 + 23 * number) % sae.dict_size
        here_R = tokens_R == word
        centered_R1 = (here_R.double() - here_R.double().mean()).unsqueeze(1)
        direction_D = 1000 * torch.linalg.lstsq(rows_RD - rows_RD.mean(0), centered_R1).solution.squeeze(1)
        sae.encoder.weight[latent] = direction_D.float()
        sae.encoder.bias[latent] = -((rows_RD - sae.pre_bias.double()) @ direction_D)[~here_R].max().float()
        planted[word] = (sae_id, latent)
    return planted


def _seek(
    index: Index, target: Target, lm: LanguageModel, texts: list[Any], planted: dict[int, tuple[str, int]]
) -> dict[str, Any]:
    cases = {}
    for word, place in planted.items():
        with_word, without = [], []
        for text in texts:
            for at in np.flatnonzero(text == word)[:1]:
                window = text[max(0, at - BEFORE) : at + AFTER]
                with_word.append(lm.tokenizer.decode(window))
                without.append(lm.tokenizer.decode(window[window != word]))
        asked = (with_word[:TEXTS], without[:TEXTS])
        found = [
            find(index, lm, target.saes, target.sites, asked[0], but_not=off, limit=5000) for off in ([], asked[1])
        ]
        ranks = [[(hit["sae"], hit["latent"]) for hit in hits] for hits in found]
        cases[f"{lm.tokenizer.decode([word])} {place[0]}/{place[1]}"] = {
            "rank": ranks[0].index(place) + 1 if place in ranks[0] else None,
            "rank_but_not": ranks[1].index(place) + 1 if place in ranks[1] else None,
            "found": [len(hits) for hits in found],
            "dense": sum(hit["density"] > 0.2 for hit in found[0]),
            "density": index.table(place[0])["density"][place[1]],
        }
    dense = sum(sum(density > 0.2 for density in index.table(sae_id)["density"]) for sae_id in index.saes)
    first = {name: sum(case[name] == 1 for case in cases.values()) for name in ("rank", "rank_but_not")}
    return {"first": first, "dense_latents": dense, "cases": cases}


if __name__ == "__main__":
    main()
