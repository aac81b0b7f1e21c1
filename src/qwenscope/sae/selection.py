"""Which latents are active: the one dense product of a training step, and the top-k of its rows.

Three precisions find each row's K largest pre-activations `x . W_n + b_n`:

    fp32    a float32 product (float64 for float64 weights).
    bf16    a bfloat16 product; the values carry its rounding too.
    exact   a product of bfloat16 or of 8-bit integers (`eight_bit`) names K + 16 or K + 48 candidates, which are then
            scored in float32. A row is certified if the lowest candidate's rough score plus twice the largest error
            seen among candidates near the threshold is below the K-th float32 value: a latent outside could then belong
            inside only if its error were beyond twice any of those seen. Rows without certificate are computed again
            in float32.

On a CPU the product is made in chunks of rows, so that a chunk's pre-activations are still in cache when their top-k is
taken and the [B, N] matrix never exists.

Legend: B rows, R rows of a chunk, D hidden, N latents, K active latents, C candidates, M latents asked for by name.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from qwenscope.sae import ops
from qwenscope.sae.eight_bit import EightBit

Precision = Literal["exact", "fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("exact", "fp32", "bf16")
MARGIN = 16
EIGHT_BIT_MARGIN = 48
CHUNK_ROWS = 256
FLOAT_CHUNK_ROWS = 512
"""Float32 products of CHUNK_ROWS rows are a tenth slower: they read the encoder too often."""
GROUP = 8
"""Columns per group of the two-stage top-k."""
SMALL = 1 << 19
"""Weights below which rescoring costs more than a faster product saves."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The active latents of a batch.

    values: [B, K], pre-activations with negatives set to 0. indices: [B, K] int64.
    named: [B, M] pre-activations of the latents asked for by name, in the product's dtype (bfloat16 for one of 8-bit
        integers); None if none were.
    redone: rows that were computed twice for want of a certificate (exact only).
    """

    values: Tensor
    indices: Tensor
    named: Tensor | None
    redone: int


def top_k(scores_RN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row -> (values [R, k], indices [R, k] int64), exact, in no particular order.

    Two stages: the k groups of GROUP strided columns with the largest maxima contain k largest values, so only their
    members are compared. Strided groups make the maxima a vectorised reduction over contiguous columns.
    """
    n = scores_RN.shape[1]
    if ops.fused(scores_RN) and scores_RN.dtype == torch.bfloat16 and n <= 65_536:
        from qwenscope.sae import triton_ops

        return triton_ops.top_k(scores_RN, k)
    groups = n // GROUP
    if n % GROUP or groups < 4 * k:
        values, indices = scores_RN.topk(k, dim=1, sorted=False)
        return values, indices
    chosen_RK = scores_RN.view(-1, GROUP, groups).amax(1).topk(k, dim=1, sorted=False).indices
    starts = torch.arange(0, n, groups, device=scores_RN.device)
    members_RC = (chosen_RK.unsqueeze(1) + starts.unsqueeze(1)).flatten(1)
    values, places = scores_RN.gather(1, members_RC).topk(k, dim=1, sorted=False)
    return values, members_RC.gather(1, places)


def best_precision(weight_ND: Tensor) -> Precision:
    """fp32 for float64; bf16 on CUDA; on a CPU exact where bfloat16 products are much the faster ones, else fp32.

    Measured on a slice of the encoder's own `weight`, milliseconds of CPU time: no flag tells how fast products are.
    """
    if weight_ND.dtype == torch.float64:
        return "fp32"
    if weight_ND.is_cuda:
        return "bf16"
    if weight_ND.numel() < SMALL:
        return "fp32"
    return "exact" if _seconds(weight_ND, torch.bfloat16) < 0.7 * _seconds(weight_ND, torch.float32) else "fp32"


def eight_bits_pay(weight_ND: Tensor) -> bool:
    """Whether products of 8-bit integers are much faster than bfloat16 ones, measured likewise."""
    if weight_ND.is_cuda or weight_ND.dtype != torch.float32 or weight_ND.numel() < SMALL:
        return False
    return _seconds(weight_ND, torch.int8) < 0.8 * _seconds(weight_ND, torch.bfloat16)


def _seconds(weight_ND: Tensor, dtype: torch.dtype) -> float:
    """Shortest of some trials, in CPU time of this thread, of a product with a slice of the encoder."""
    weight = weight_ND.detach()[:2048].to(dtype)
    rows, trials = weight[:128], []
    for _ in range(5):
        begin = time.thread_time()
        torch._int_mm(rows, weight.T) if dtype == torch.int8 else torch.mm(rows, weight.T)
        trials.append(time.thread_time() - begin)
        if sum(trials) > 0.2:  # a product without a kernel for this CPU
            break
    return min(trials)


_BUFFERS: WeakValueDictionary[tuple[int, torch.device, torch.dtype], Tensor] = WeakValueDictionary()


def _buffer(numbers: int, like: Tensor) -> Tensor:
    """Memory for so many numbers that selectors of one thread share: reused, since fresh pages cost more than a top-k,
    and once for all SAEs of a run, which select one after the other. It lives as long as any of them holds it.
    """
    key = threading.get_ident(), like.device, like.dtype
    buffer = _BUFFERS.get(key)
    if buffer is None or len(buffer) < numbers:
        _BUFFERS[key] = buffer = like.new_empty(numbers)
    return buffer


class Selector:
    """Selects the active latents of batches; holds the buffer of one chunk of pre-activations between calls.

    Args:
        k: active latents per row.
        precision: see the module.
    """

    def __init__(self, k: int, precision: Precision) -> None:
        self.k = k
        self.precision = precision
        self._held: Tensor | None = None

    def __call__(
        self,
        rows: ops.Panels | Tensor,
        weight_ND: Tensor,
        shadow_ND: Tensor | EightBit,
        bias_N: Tensor,
        names: Tensor | None = None,
    ) -> Selection:
        """Select among `rows @ weight.T + bias`; `shadow` is `weight` as the product takes it.

        `names`: [M] int64, latents whose pre-activations are wanted for every row.
        """
        rows, candidates = ops.Panels.of(rows), self.k
        if self.precision == "exact":
            candidates += EIGHT_BIT_MARGIN if isinstance(shadow_ND, EightBit) else MARGIN
        named_dtype = torch.bfloat16 if isinstance(shadow_ND, EightBit) else shadow_ND.dtype
        scores, places, named = [], [], []
        for pre_RN in self._products(rows, weight_ND, shadow_ND, bias_N):
            values, indices = top_k(pre_RN, min(candidates, len(weight_ND)))
            scores.append(values)
            places.append(indices)
            if names is not None:
                named.append(pre_RN.index_select(1, names).to(named_dtype))
        values, indices, redone = ops.joined(scores), ops.joined(places), 0
        if self.precision == "exact":
            values, indices, redone = self._rescore(rows, weight_ND, bias_N, values, indices)
        return Selection(values.to(weight_ND.dtype).relu_(), indices, ops.joined(named) if named else None, redone)

    def _products(
        self, rows: ops.Panels, weight_ND: Tensor, shadow_ND: Tensor | EightBit, bias_N: Tensor
    ) -> Iterator[Tensor]:
        """Pre-activations [R, N] of some rows after others; each overwrites the one before."""
        if isinstance(shadow_ND, EightBit):
            yield from shadow_ND.scores(rows, weight_ND, bias_N)
            return
        bias_N = bias_N.to(shadow_ND.dtype)
        size = CHUNK_ROWS if shadow_ND.dtype == torch.bfloat16 else FLOAT_CHUNK_ROWS
        size = len(rows) if weight_ND.is_cuda else size
        for start in range(0, len(rows), size):
            chunk_RD = rows[start : start + size].to(shadow_ND.dtype)
            numbers = len(chunk_RD) * len(shadow_ND)
            self._held = _buffer(numbers, shadow_ND)
            yield torch.addmm(bias_N, chunk_RD, shadow_ND.T, out=self._held[:numbers].view(len(chunk_RD), -1))

    def _rescore(
        self, rows: ops.Panels, weight_ND: Tensor, bias_N: Tensor, rough_BC: Tensor, indices_BC: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Float32 values of the candidates, the K largest of them, and uncertified rows done again."""
        n = len(weight_ND)
        pairs = ops.Pairs.of(indices_BC, n)
        exact_BC = pairs.unsort(pairs.products(weight_ND, rows)) + bias_N[indices_BC]
        values_BK, places_BK = exact_BC.topk(self.k, dim=1, sorted=False)
        indices_BK = indices_BC.gather(1, places_BK)
        if indices_BC.shape[1] == n:
            return values_BK, indices_BK, 0
        rough_BC = rough_BC.to(exact_BC.dtype)
        threshold_B1 = values_BK.amin(1, keepdim=True).relu_()
        # The product's rounding grows with the score: only errors near the threshold say what happens below it.
        error_BC = (rough_BC - exact_BC).abs_().masked_fill_(exact_BC > 2 * threshold_B1, 0)
        certified_B = rough_BC.amin(1) + 2 * error_BC.amax(1) < threshold_B1.squeeze(1)
        again = (~certified_B).nonzero().squeeze(1)
        for some in torch.split(again, CHUNK_ROWS):
            pre_RN = torch.addmm(bias_N, rows[some], weight_ND.T)
            values_BK[some], indices_BK[some] = top_k(pre_RN, self.k)
        return values_BK, indices_BK, len(again)
