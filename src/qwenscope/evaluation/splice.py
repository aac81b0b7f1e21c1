"""Model-level effect of an SAE: next-token loss when its reconstruction replaces the rows at its site.

One clean pass of a batch serves every SAE. A variant (splice, zero or mean ablation at one site) restarts from the
clean pass there, so that only what stands above it is computed; what reaches the LM head is kept as hidden
states, and logits are made chunk by chunk, the clean ones once for all variants, so that memory does not grow with the
vocabulary. Token losses and sums are float64.

Legend: C conversations of a batch, T positions, D hidden, R rows of real (unpadded) tokens, P rows whose token has a
successor to predict, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qwenscope.lm.batches import Batch
from qwenscope.lm.forward import final_hidden, logits, unembedding
from qwenscope.lm.hooks import Recording, record, restart
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site

# Elements of one chunk of logits, but at least 64 rows: on a GPU 135 rows of the published model's vocabulary (268 MB
# in float64); on a CPU what its caches hold, three times faster than larger chunks.
GPU_CHUNK, CPU_CHUNK, LEAST_ROWS = 1 << 25, 1 << 20, 64

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class CleanPass:
    """One batch run without intervention.

    Attributes:
        batch: the conversations.
        recording: the rows at the asked sites, and what else a variant goes on from.
        real_CT: bool, True at tokens, False at padding.
        hidden_PD: rows that enter the LM head, in order of (conversation, position).
        target_P: int64, the next token of each.
        row_P: int64, which row of the batch (0 .. C-1) each belongs to.
    """

    batch: Batch
    recording: Recording
    real_CT: Tensor
    hidden_PD: Tensor
    target_P: Tensor
    row_P: Tensor

    @property
    def predicting(self) -> Tensor:
        """True at tokens that have a successor in their conversation."""
        predicts_CT = torch.zeros_like(self.real_CT)
        predicts_CT[:, :-1] = self.real_CT[:, 1:]
        return predicts_CT


@dataclass(frozen=True)
class Losses:
    """Losses of one variant at each predicting token, float64 [P]."""

    ce_P: Tensor
    kl_P: Tensor
    """KL divergence from the clean to the variant's next-token distribution, in nats."""


def clean_pass(lm: LanguageModel, batch: Batch, sites: Iterable[Site]) -> CleanPass:
    """Run a batch without intervention and keep what variants at `sites` go on from."""
    with record(lm, sites) as recording:
        hidden_CTD = final_hidden(lm, batch.input_ids_CT)
    ids_CT = batch.input_ids_CT.to(lm.device)
    lengths_C = torch.tensor(batch.lengths_C, device=lm.device)
    real_CT = torch.arange(ids_CT.shape[1], device=lm.device) < lengths_C[:, None]
    row_P, position_P = real_CT[:, 1:].nonzero(as_tuple=True)
    hidden_PD, target_P = hidden_CTD[row_P, position_P], ids_CT[row_P, position_P + 1]
    return CleanPass(batch, recording, real_CT, hidden_PD, target_P, row_P)


def variant_pass(lm: LanguageModel, clean: CleanPass, site: Site, edited_CTD: Tensor) -> Tensor:
    """Go on from `edited_CTD` at `site`; rows that enter the LM head, [P, D]."""
    with restart(lm, clean.recording, site, edited_CTD):
        hidden_CTD = final_hidden(lm, clean.batch.input_ids_CT)
    return hidden_CTD[clean.predicting]


def losses(
    lm: LanguageModel, clean: CleanPass, variants: Mapping[Key, Tensor], chunk: int | None = None
) -> tuple[Tensor, dict[Key, Losses]]:
    """Next-token losses of the clean pass and of each variant.

    Args:
        lm: the language model with its LM head.
        clean: the clean pass.
        variants: {key: hidden_PD} from `variant_pass`.
        chunk: rows of logits made at once; None chooses by device and vocabulary.

    Returns:
        Clean cross-entropy per predicting token (float64 [P]) and {key: Losses}.
    """
    if chunk is None:
        elements = GPU_CHUNK if lm.device.type == "cuda" else CPU_CHUNK
        chunk = max(LEAST_ROWS, elements // len(unembedding(lm)))
    # Room for all results comes first: small tensors that are kept between large ones that are freed would split the
    # heap, and memory would grow by each chunk's logits.
    predicting = len(clean.target_P)
    clean_ce_P = clean.hidden_PD.new_empty(predicting, dtype=torch.float64)
    found = {key: Losses(torch.empty_like(clean_ce_P), torch.empty_like(clean_ce_P)) for key in variants}
    for start in range(0, predicting, chunk):
        part = slice(start, start + chunk)
        target_P = clean.target_P[part]
        clean_PV, clean_norm_P = _scores(lm, clean.hidden_PD[part])
        probability_PV = (clean_PV - clean_norm_P[:, None]).exp_()
        expected_P = _dot(probability_PV, clean_PV)
        clean_ce_P[part] = clean_norm_P - _at(clean_PV, target_P)
        for key, hidden_PD in variants.items():
            score_PV, norm_P = _scores(lm, hidden_PD[part])
            found[key].ce_P[part] = norm_P - _at(score_PV, target_P)
            # sum p (log p - log q), with log p = clean score - its norm and log q = score - its norm
            found[key].kl_P[part] = expected_P - _dot(probability_PV, score_PV) - clean_norm_P + norm_P
    return clean_ce_P, found


def _scores(lm: LanguageModel, hidden_PD: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and their log-sum-exp, float64."""
    score_PV = logits(lm, hidden_PD).double()
    return score_PV, score_PV.logsumexp(1)


def _dot(a_PV: Tensor, b_PV: Tensor) -> Tensor:
    product_P: Tensor = torch.linalg.vecdot(a_PV, b_PV)
    return product_P


def _at(score_PV: Tensor, target_P: Tensor) -> Tensor:
    return score_PV.gather(1, target_P[:, None]).squeeze(1)
