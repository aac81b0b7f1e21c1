"""Output scores: whether a push along a latent makes the model say what the latent promotes.

After Arad, Mueller and Belinkov (2025, "SAEs are good for steering, if you select the right features", arXiv
2505.20063) and the code beside it. The last position of a neutral prompt is pushed along the latent by FACTOR times the
largest activation of any latent there. Of the next-token distribution that follows,

    score = (1 - r / V) p

p the largest probability of any of the TOP tokens that the latent's decoder direction promotes by the logit lens, r how
many tokens are likelier than that one. It lies between 0 and 1; beside it stands the same without the push.

The same pass gives the delta token confidence of Wang, Hu, Wang and Zou (2025, "Does higher interpretability imply
better utility?", arXiv 2510.03659, appendix D, with their k of 1), whatever the latent promotes:

    -log max p(pushed) + log max p(clean)

in nats: below 0 the push makes the model surer of its next token, above 0 less sure; they steer by either extreme.

Legend: M latents of a batch, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qwenscope.errors import FormatError
from qwenscope.features.geometry import token_effects
from qwenscope.features.store import Index
from qwenscope.files import read_object, write_json
from qwenscope.lm.forward import final_hidden, final_norm, logits, unembedding
from qwenscope.lm.hooks import record, restart
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import to_stream
from qwenscope.opening import Target

PROMPT = "From my experience,"
FACTOR = 10.0
TOP = 20
ROWS = 64
"""Latents pushed in one pass."""
FILE = "output_scores.json"
Score = tuple[float, float, float]
"""With the push, and without; delta token confidence."""


@torch.no_grad()
def output_scores(target: Target, lm: LanguageModel, sae_id: str, latents: Sequence[int]) -> Iterator[Score]:
    """The score of each of `latents`, in order, ROWS of them to a pass.

    Args:
        target: the SAEs.
        lm: their whole language model with its LM head.
        sae_id: one of them; a transcoder's latents push where it writes.
        latents: its.

    Raises:
        ModelError: the model was loaded truncated or without LM head.
    """
    sae, site, pushed = target.saes[sae_id], target.sites[sae_id], target.targets[sae_id]
    ids_MT = torch.tensor([lm.tokenizer(PROMPT).input_ids]).expand(ROWS, -1)
    norm, head = final_norm(lm), unembedding(lm)
    with record(lm, {site, pushed}) as recording:
        clean_V = logits(lm, final_hidden(lm, ids_MT)[0, -1]).softmax(-1)
    largest = float(sae.encode(recording.rows[site][0, -1:].to(sae.pre_bias.device)).values.max())
    for start in range(0, len(latents), ROWS):
        part = list(latents[start : start + ROWS])
        directions_MD = sae.decoder.weight.detach().T[part]
        (_, promoted_MK), *_ = token_effects(to_stream(lm, pushed, directions_MD), norm, head, min(TOP, len(head)))
        rows_MTD = recording.rows[pushed].to(torch.float32, copy=True)
        rows_MTD[: len(part), -1] += FACTOR * largest * directions_MD.to(rows_MTD.device)
        with restart(lm, recording, pushed, rows_MTD.to(recording.rows[pushed].dtype)):
            hidden_MD = final_hidden(lm, ids_MT)[: len(part), -1]
        pushed_MV = logits(lm, hidden_MD).softmax(-1)
        for probability_V, promoted_K in zip(pushed_MV, promoted_MK.to(pushed_MV.device), strict=True):
            confidence = float((clean_V.max() / probability_V.max()).log())
            yield _score(probability_V, promoted_K), _score(clean_V, promoted_K), confidence


def _score(probability_V: Tensor, promoted_K: Tensor) -> float:
    best = probability_V[promoted_K].max()
    likelier = int((probability_V > best).sum())
    return (1 - likelier / len(probability_V)) * float(best)


def keep_scores(index: Index, scores: dict[str, list[Score]]) -> None:
    """Write scores of all latents of some SAEs beside an index; those of others stay."""
    path = index.folder / FILE
    written = {sae_id: [[_short(x) for x in score] for score in found] for sae_id, found in scores.items()}
    write_json(path, {**(read_object(path) if path.is_file() else {}), **written})


def kept_scores(index: Index, sae_id: str) -> list[list[float | None]]:
    """[score, without the push, delta token confidence] of each latent of an SAE; empty if none were kept.

    Raises:
        FormatError: the file is damaged; MissingLatentError: no such SAE.
    """
    index.ordinal(sae_id)
    path = index.folder / FILE
    found = read_object(path).get(sae_id, []) if path.is_file() else []
    scores = isinstance(found, list) and all(isinstance(each, list) and len(each) in (2, 3) for each in found)
    if not scores or len(found) not in (0, index.saes[sae_id]["dict_size"]):
        raise FormatError(f"{path} is damaged; remove it, and make it anew with `qwenscope output-scores`")
    return [[*each, None][:3] for each in found]  # the first ones had no confidence


def _short(value: float) -> float:
    return float(f"{value:.4g}")
