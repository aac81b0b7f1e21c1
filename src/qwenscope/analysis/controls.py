"""What a latent's separation of two piles must be compared with, besides `evaluation/baselines.py`: rows as they are,
words, and what differs between the piles besides the behavior.

Legend: C conversations, R rows, D hidden, N latents, V tokens of the vocabulary that occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2_contingency
from torch import Tensor

from qwenscope.analysis.piles import Piles
from qwenscope.analysis.pooling import Pool, Scope
from qwenscope.analysis.statistics import Design, effects, permutation_test
from qwenscope.corpus.conversation import ROLES, Conversation


def raw_features(pool: Pool) -> NDArray[np.float32]:
    """Rows as they are: mean and largest value of each dimension over the tokens that count, [C, 2 D]."""
    features: NDArray[np.float32] = torch.cat([pool.by("mean"), pool.by("max")], dim=1).numpy()
    return features


def word_counts(
    conversations: Sequence[Conversation], scope: Scope, skip_roles: Sequence[str], vocabulary_V: NDArray[np.int64]
) -> NDArray[np.float32]:
    """log(1 + how often each token of `vocabulary_V` stands among those that count), float32 [C, V]."""
    counts = np.zeros((len(conversations), len(vocabulary_V) + 1), dtype=np.float32)
    for c, conversation in enumerate(conversations):
        ids = conversation.token_ids[scope.mask(conversation.roles, skip_roles)].astype(np.int64)
        place = np.minimum(np.searchsorted(vocabulary_V, ids), max(len(vocabulary_V) - 1, 0))
        known = vocabulary_V[place] == ids if len(vocabulary_V) else np.zeros(len(ids), dtype=bool)
        np.add.at(counts[c], place[known], 1)
    words_CV: NDArray[np.float32] = np.log1p(counts[:, :-1])
    return words_CV


def vocabulary(conversations: Sequence[Conversation], fewest: int = 2) -> NDArray[np.int64]:
    """Ids of the tokens that stand in at least `fewest` of the conversations, ascending."""
    every = np.concatenate([np.unique(conversation.token_ids) for conversation in conversations])
    ids, counts = np.unique(every, return_counts=True)
    kept: NDArray[np.int64] = ids[counts >= fewest].astype(np.int64)
    return kept


def confound_features(conversations: Sequence[Conversation]) -> tuple[list[str], NDArray[np.float32]]:
    """What a pile may differ in besides the behavior: log of the tokens, and the share of each role but the last.

    Returns:
        Names, and float32 [C, features].
    """
    codes = sorted({int(code) for conversation in conversations for code in np.unique(conversation.roles)})
    columns = [[np.log(len(conversation.token_ids)) for conversation in conversations]]
    columns += [[float((conversation.roles == code).mean()) for conversation in conversations] for code in codes]
    return ["length", *(f"share of {ROLES[code]}" for code in codes)], np.array(columns, dtype=np.float32).T


def confounds(piles: Piles, design: Design, seed: int) -> dict[str, Any]:
    """How the piles differ besides the behavior, with permutation p-values.

    Returns:
        {"length": {"positive", "negative" (mean tokens), "effect", "p"}, "roles": {role: {"positive", "negative" (mean
        share), "effect", "p"}}, "language" and "source": {"positive": {value: n}, "negative": {value: n}, "p" (chi
        squared; None where all are alike)}}.
    """
    names, features_CF = confound_features(piles.conversations)
    pool_CF = torch.from_numpy(features_CF)
    effect_F, tested = effects(pool_CF, design), permutation_test(pool_CF, design, seed)
    shown_CF = features_CF.copy()
    shown_CF[:, 0] = np.exp(shown_CF[:, 0])
    sides = {"positive": design.positive_C, "negative": ~design.positive_C}
    cells = [
        {side: float(shown_CF[of_C, f].mean()) for side, of_C in sides.items()}
        | {"effect": float(effect_F[f]), "p": float(tested.p_F[f])}
        for f in range(len(names))
    ]
    of_row = {
        "language": [each.language for each in piles.given],
        "source": [each.conversation.source for each in piles.given],
    }
    return {
        "length": cells[0],
        "roles": {name.removeprefix("share of "): cell for name, cell in zip(names[1:], cells[1:], strict=True)},
        **{name: _categories(values, design) for name, values in of_row.items()},
    }


def _categories(values: list[str], design: Design) -> dict[str, Any]:
    names, codes_C = np.unique(values, return_inverse=True)
    counts = [np.bincount(codes_C[of_C], minlength=len(names)) for of_C in (design.positive_C, ~design.positive_C)]
    p = float(chi2_contingency(np.array(counts), correction=False).pvalue) if len(names) > 1 else None
    shown = [{str(name): int(n) for name, n in zip(names, side, strict=True) if n} for side in counts]
    return {"positive": shown[0], "negative": shown[1], "p": p}


def adjusted_effects(features_CF: Tensor, design: Design, confound_CF: NDArray[np.float32]) -> Tensor:
    """Effects on what is left of each feature once length and role shares are regressed out, float32 [F]."""
    base = torch.cat([torch.ones(len(features_CF), 1), torch.from_numpy(confound_CF)], dim=1).double()
    values_CF = features_CF.double()
    left_CF = values_CF - base @ (torch.linalg.pinv(base, rtol=1e-6) @ values_CF)
    return effects(left_CF, design)
