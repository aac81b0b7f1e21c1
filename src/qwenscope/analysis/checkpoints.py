"""Two checkpoints of a language model on one corpus, through the same SAEs: latents whose firing changed, on which
tokens, and how much worse the SAEs fit.

    from qwenscope.analysis.checkpoints import diff_checkpoints

    diff_checkpoints("runs/demo", data=Path("chats.jsonl"), model_b="tuned")

Every conversation is read by both, so that the tests of `diff` are paired. The models are loaded one after the other.
Definitions: docs/analysis.md.

Legend: C conversations, R rows, D hidden, N latents, V tokens of the vocabulary, S bootstrap samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwenscope.analysis.contrast import OnProgress, chosen_saes
from qwenscope.analysis.diff import compared
from qwenscope.analysis.heads import head
from qwenscope.analysis.piles import Reader, labelled
from qwenscope.analysis.pooling import Pool, Scope, scoped_rows
from qwenscope.analysis.statistics import Array
from qwenscope.corpus.conversation import Conversation
from qwenscope.errors import ModelError
from qwenscope.evaluation.pairs import interval, resample
from qwenscope.features.token_text import pieces_of, readable
from qwenscope.files import write_json
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target, as_target
from qwenscope.sae.sae import Codes
from qwenscope.training.lock import sole_writer

SHOWN = 6
"""Tokens that are named for each latent."""


class Fit:
    """What FVU is made of, per conversation: of one SAE on one checkpoint's rows."""

    def __init__(self, conversations: int, width: int) -> None:
        self.residual_C = torch.zeros(conversations, dtype=torch.float64)
        self.square_C = torch.zeros(conversations, dtype=torch.float64)
        self.sum_CD = torch.zeros(conversations, width, dtype=torch.float64)
        self.rows_C = torch.zeros(conversations, dtype=torch.float64)

    def add(self, x_RD: Tensor, x_hat_RD: Tensor, conversation_R: Tensor) -> None:
        """Rows and their reconstructions."""
        x_RD, x_hat_RD = x_RD.double().cpu(), x_hat_RD.double().cpu()
        self.residual_C.index_add_(0, conversation_R, (x_hat_RD - x_RD).square().sum(1))
        self.square_C.index_add_(0, conversation_R, x_RD.square().sum(1))
        self.sum_CD.index_add_(0, conversation_R, x_RD)
        self.rows_C += torch.bincount(conversation_R, minlength=len(self.rows_C))

    def fvu(self, weights_SC: Tensor) -> Array:
        """Error as a share of the rows' variance, [S], of conversations drawn so often."""
        mean_SD = weights_SC @ self.sum_CD / (rows_S := weights_SC @ self.rows_C).unsqueeze(1)
        deviation_S = weights_SC @ self.square_C - rows_S * mean_SD.square().sum(1)
        found: Array = (weights_SC @ self.residual_C / deviation_S).numpy()
        return found


@dataclass
class Side:
    """What one checkpoint left of one SAE besides the pool that it shares with the other."""

    fit: Fit
    fired_NV: csr_array
    """int32: how often each latent fired on each token."""

    def count(self, codes: Codes, token_R: Tensor) -> None:
        """Rows' codes [R, K], and the tokens at which the rows are."""
        active_RK = codes.values.cpu() > 0
        latents = codes.indices.cpu()[active_RK].numpy()
        tokens = token_R.unsqueeze(1).expand(active_RK.shape)[active_RK].numpy()
        fired = csr_array((np.ones(len(latents), dtype=np.int32), (latents, tokens)), shape=self.fired_NV.shape)
        self.fired_NV = self.fired_NV + fired


def diff_checkpoints(
    target: str | Path | Target,
    *,
    data: Path,
    model_b: str,
    out: Path | None = None,
    saes: Sequence[str] = (),
    scope: Scope = Scope(),  # noqa: B008 - frozen
    on_progress: OnProgress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Test every latent's firing rate between the target's own language model (a) and another checkpoint (b).

    Args:
        target: what `open_target` takes, or what it gave.
        data: conversations or documents; both models read a's rendering of them.
        model_b: folder or Hub id of a model of the same shape.
        out: file to write the result to as JSON.
        saes: ids of those looked at; none named: all.
        scope: which tokens count.
        on_progress: called with (phase, done, total).

    Returns:
        docs/analysis.md says what the keys mean.

    Raises:
        FormatError: an SAE that is not there, or does not fit the other model.
        CorpusError: the corpus cannot be read or has too few conversations.
        ModelError: the other model cannot be loaded, has no such sites, or other tokens.
        LockError: another process writes `out`.
    """
    with sole_writer(out):
        opened = as_target(target)
        ids = chosen_saes(opened, saes)
        own = opened.recipe.lm
        lm = opened.language_model(truncated=True)
        tokenizer, seed = lm.tokenizer, opened.recipe.seed
        given = Reader(tokenizer, opened.recipe.corpus.max_length).pile(data)
        pools = {id: Pool.empty(2 * len(given), opened.saes[id].dict_size) for id in ids}
        conversations = [each.conversation for each in given]
        reading = _Reading(conversations, pools, lm.known_tokens, scope, on_progress)
        a = reading.read(opened, lm, 0)
        del lm
        recipe = opened.recipe.model_copy(update={"lm": own.model_copy(update={"model": model_b, "revision": None})})
        lm = dataclasses.replace(opened, recipe=recipe, revisions={}).language_model(truncated=True)
        check_tokens(conversations, tokenizer, lm.tokenizer, model_b)
        b = reading.read(opened, lm, 1)
        twice = labelled([each for each in given for _ in range(2)], [True, False] * len(given))
        result = head("checkpoints", opened, ids) | {"data": str(data), "model": {"a": own.model, "b": model_b}}
        result |= compared(dataclasses.replace(twice, paired=True), pools, seed)
        for found in result["latents"]:
            id = found["sae"]
            found["tokens"] = _tokens(found["latent"], a[id].fired_NV, b[id].fired_NV, reading.counts_V, tokenizer)
        result["fvu"] = {
            id: _fvu_change(a[id].fit, b[id].fit, seed) for id in ids if "target" not in opened.saes[id].config
        }
        if out is not None:
            write_json(out, result)
    return result


def check_tokens(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    name: str,
) -> None:
    """ModelError unless both tokenizers mean the same by every id that stands in the conversations."""
    ids = np.unique(np.concatenate([conversation.token_ids for conversation in conversations])).tolist()
    for id, here, there in zip(ids, *(each.convert_ids_to_tokens(ids) for each in (tokenizer, other)), strict=True):
        if here != there:
            raise ModelError(f"token {id} is {here!r} to the SAEs' language model and {there!r} to {name}")


@dataclass
class _Reading:
    """One pass of a checkpoint over the corpus."""

    conversations: list[Conversation]
    pools: dict[str, Pool]
    """Of 2 C conversations: number 2 c is a's reading of c, number 2 c + 1 b's."""
    vocabulary: int
    scope: Scope
    on_progress: OnProgress

    def __post_init__(self) -> None:
        self.token_T = torch.from_numpy(np.concatenate([each.token_ids for each in self.conversations])).long()
        lengths = [0, *(len(each.token_ids) for each in self.conversations)]
        self.start_C = torch.tensor(lengths).cumsum(0)
        self.counts_V = torch.zeros(self.vocabulary, dtype=torch.int64)
        """How often each token counts, of the last checkpoint read: they are the same."""

    def read(self, target: Target, lm: LanguageModel, side: int) -> dict[str, Side]:
        """{sae_id: what it left}."""
        count, sides = len(self.conversations), {}
        for id in self.pools:
            fired = csr_array((target.saes[id].dict_size, self.vocabulary), dtype=np.int32)
            sides[id] = Side(Fit(count, target.saes[id].hidden_dim), fired)
        self.counts_V.zero_()
        sites = sorted({target.sites[id] for id in self.pools})
        for part in scoped_rows(lm, self.conversations, sites, self.scope, target.recipe):
            token_R = self.token_T[self.start_C[part.conversation_R] + part.position_R]
            self.counts_V += torch.bincount(token_R, minlength=self.vocabulary)
            for id, pool in self.pools.items():
                x_RD, sae = part.rows[target.sites[id]].float(), target.saes[id]
                with torch.no_grad():
                    codes = sae.encode(x_RD)
                    if "target" not in sae.config:
                        sides[id].fit.add(x_RD, sae.decode(codes), part.conversation_R)
                pool.add_codes(codes, 2 * part.conversation_R + side)
                sides[id].count(codes, token_R)
            self.on_progress(f"reading {lm.name}", part.stop, count)
        return sides


def _tokens(
    latent: int, a_NV: csr_array, b_NV: csr_array, counts_V: Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The tokens on which a latent's firing changed most often."""
    a_V, b_V = (fired[[latent]].toarray()[0].astype(np.int64) for fired in (a_NV, b_NV))
    order = np.argsort(-np.abs(b_V - a_V), kind="stable")[:SHOWN]
    return [
        {
            "token": readable(pieces_of(tokenizer, [id]))[0],
            "count": int(counts_V[id]),
            "a": int(a_V[id]),
            "b": int(b_V[id]),
        }
        for id in order.tolist()
        if a_V[id] != b_V[id]
    ]


def _fvu_change(a: Fit, b: Fit, seed: int) -> dict[str, Any]:
    """FVU on either checkpoint's rows, and the change with its bootstrap interval over conversations."""
    count = len(a.rows_C)
    (whole_a,), (whole_b,) = (side.fvu(torch.ones(1, count, dtype=torch.float64)) for side in (a, b))
    weights_SC = torch.from_numpy(resample(count, seed))
    samples_S = b.fvu(weights_SC) - a.fvu(weights_SC)
    return {
        "a": float(whole_a),
        "b": float(whole_b),
        "change": float(whole_b - whole_a),
        "interval": interval(samples_S),
    }
