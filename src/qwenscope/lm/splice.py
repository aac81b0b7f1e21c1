"""Passes that go on from replaced rows: next-token loss when reconstructions stand at an SAE's site.

One clean pass of a batch serves every SAE. A variant (splice, zero or mean ablation at one site) restarts from the
clean pass there, so that only what stands above it is computed; what reaches the LM head is kept as hidden
states, and logits are made chunk by chunk, the clean ones once for all variants, so that memory does not grow with the
vocabulary. Logits and their exponentials are float32; sums over the vocabulary are float32 within short blocks and
float64 beyond, which leaves a token's loss within 1e-6 of float64 throughout. Sums over tokens are float64.

Legend: C conversations of a batch, T positions, D hidden, R rows of real (unpadded) tokens, P rows whose token has a
successor to predict, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qwenscope.lm.batches import Batch
from qwenscope.lm.forward import final_hidden, logits, unembedding
from qwenscope.lm.hooks import Recording, record, restart
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site

# Elements of one chunk of logits, but at least 64 rows: 135 rows of the published model's vocabulary on a GPU (134 MB),
# 64 on a CPU; 170 of a vocabulary of 49,152. Products of fewer rows run at half the rate.
GPU_CHUNK, CPU_CHUNK, LEAST_ROWS = 1 << 25, 1 << 23, 64
BLOCK = 64  # columns that are summed in float32

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


def replaced(x_CTD: Tensor, kept_CT: Tensor, rows: Tensor) -> Tensor:
    """A copy of the stream whose kept rows are `rows` ([R, D], or [D] for all)."""
    edited_CTD = x_CTD.clone()
    edited_CTD[kept_CT] = rows.to(x_CTD.dtype)
    return edited_CTD


def variant_pass(lm: LanguageModel, clean: CleanPass, site: Site, edited_CTD: Tensor, *, grad: bool = False) -> Tensor:
    """Go on from `edited_CTD` at `site`; rows that enter the LM head, [P, D]. `grad`: with the way back to it."""
    with torch.set_grad_enabled(grad), restart(lm, clean.recording, site, edited_CTD):
        hidden_CTD = final_hidden(lm, clean.batch.input_ids_CT, grad=grad)
        return hidden_CTD[clean.predicting]


def chunk_rows(lm: LanguageModel) -> int:
    """How many rows of logits are made at once, by device and vocabulary."""
    return max(LEAST_ROWS, (GPU_CHUNK if lm.device.type == "cuda" else CPU_CHUNK) // len(unembedding(lm)))


def losses(
    lm: LanguageModel,
    clean: CleanPass,
    variants: Mapping[Key, Tensor],
    chunk: int | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> tuple[Tensor, dict[Key, Losses]]:
    """Next-token losses of the clean pass and of each variant.

    Args:
        lm: the language model with its LM head.
        clean: the clean pass.
        variants: {key: hidden_PD} from `variant_pass`.
        chunk: rows of logits made at once; None chooses by device and vocabulary.
        on_rows: told how many rows have gone through the LM head since it was last called, the variants' rows too.

    Returns:
        Clean cross-entropy per predicting token (float64 [P]) and {key: Losses}.
    """
    chunk = chunk or chunk_rows(lm)
    # Room for all results comes first: small tensors that are kept between large ones that are freed would split the
    # heap, and memory would grow by each chunk's logits.
    predicting = len(clean.target_P)
    clean_ce_P = clean.hidden_PD.new_empty(predicting, dtype=torch.float64)
    found = {key: Losses(torch.empty_like(clean_ce_P), torch.empty_like(clean_ce_P)) for key in variants}
    for start in range(0, predicting, chunk):
        part = slice(start, start + chunk)
        target_P = clean.target_P[part]
        clean_PV = logits(lm, clean.hidden_PD[part])
        weight_PV = clean_PV.clone()
        weight_P, clean_norm_P = _exponentials(weight_PV)
        clean_ce_P[part] = clean_norm_P - _at(clean_PV, target_P)
        for key, hidden_PD in variants.items():
            score_PV = logits(lm, hidden_PD[part])
            target_score_P = _at(score_PV, target_P)
            # sum p (log p - log q), with log p = clean score - its norm and log q = score - its norm
            apart_P = _sum((clean_PV - score_PV).mul_(weight_PV)) / weight_P
            norm_P = _exponentials(score_PV)[1]
            found[key].ce_P[part] = norm_P - target_score_P
            found[key].kl_P[part] = apart_P - clean_norm_P + norm_P
        on_rows(len(target_P) * (1 + len(variants)))
    return clean_ce_P, found


def _exponentials(score_PV: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite logits by the exponentials of what each lies below its row's largest; their sums and the rows'
    log-sum-exp, float64."""
    largest_P = score_PV.amax(1)
    sum_P = _sum(score_PV.sub_(largest_P[:, None]).exp_())
    return sum_P, sum_P.log() + largest_P


def _sum(x_PV: Tensor) -> Tensor:
    """Sum of each row, float64."""
    whole = x_PV.shape[1] // BLOCK * BLOCK
    blocks_PX = x_PV[:, :whole].reshape(len(x_PV), -1, BLOCK).sum(2) if whole else x_PV[:, :0]
    sum_P: Tensor = blocks_PX.sum(1, dtype=torch.float64) + x_PV[:, whole:].sum(1, dtype=torch.float64)
    return sum_P


def _at(score_PV: Tensor, target_P: Tensor) -> Tensor:
    return score_PV.gather(1, target_P[:, None]).squeeze(1).double()
