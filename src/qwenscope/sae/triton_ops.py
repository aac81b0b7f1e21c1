"""Triton kernels of the training step for CUDA: top-k, pair products, gradient rows.

Each does what the plain function of the same name in `selection.py` or `ops.py` does, with static launch grids and no
host synchronisation, so that a step can be captured as a CUDA graph; sums have one order, so results are deterministic.
Limits: `top_k` takes bfloat16 rows of at most 65,536 columns. Imported only where Triton is (CUDA, or its interpreter
on a CPU: TRITON_INTERPRET=1).

Legend: R rows of scores, B rows of a batch, D hidden, N latents, K kept per row, P pairs (row,
latent) sorted by latent.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 65_536


@triton.jit  # type: ignore[untyped-decorator]
def _top_k_kernel(scores, values, indices, n, k, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row, the row in registers.

    bfloat16 has 16 bits: 16 bisections of an order-preserving integer key find the k-th largest value exactly. Ties at
    that value go to the lowest columns; places in the output come from a running count, so columns ascend.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    inside = columns < n
    score = tl.load(scores + row * n + columns, mask=inside, other=0.0)
    bits = score.to(tl.int16, bitcast=True).to(tl.int32)
    key = tl.where(bits < 0, bits ^ 0x7FFF, bits)
    key = tl.where(inside, key, -32769)
    threshold = tl.full((), -32768, tl.int32)
    for bit in tl.static_range(16):
        higher = threshold + (1 << (15 - bit))
        count = tl.sum((key >= higher).to(tl.int32), axis=0)
        threshold = tl.where(count >= k, higher, threshold)
    above = (key > threshold).to(tl.int32)
    level = (key == threshold).to(tl.int32)
    room = k - tl.sum(above, axis=0)
    taken = (above == 1) | ((level == 1) & (tl.cumsum(level, axis=0) <= room))
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(values + row * k + place, score, mask=taken)
    tl.store(indices + row * k + place, columns.to(tl.int64), mask=taken)


@triton.jit  # type: ignore[untyped-decorator]
def _products_kernel(table, x, latents, rows, out, d, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per pair. Pairs are sorted by latent, so the table's row is mostly in cache."""
    pair = tl.program_id(0)
    table_row = table + tl.load(latents + pair).to(tl.int64) * d
    x_row = x + tl.load(rows + pair).to(tl.int64) * d
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < d
        left = tl.load(table_row + columns, mask=inside, other=0.0).to(tl.float32)
        total += left * tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + pair, tl.sum(total, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _latent_rows_kernel(x, rows, weights, offsets, out, d, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per latent and block of columns: a popular latent's work is spread over its columns."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d
    total = tl.zeros((BLOCK_D,), tl.float32)
    for pair in range(tl.load(offsets + latent), tl.load(offsets + latent + 1)):
        weight = tl.load(weights + pair).to(tl.float32)
        row = tl.load(rows + pair).to(tl.int64)
        total += weight * tl.load(x + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + latent * d + columns, total, mask=inside)


def top_k(scores_RN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each bfloat16 row -> (values [R, k], indices [R, k] int64), by ascending index."""
    r, n = scores_RN.shape
    assert scores_RN.dtype == torch.bfloat16
    assert scores_RN.is_contiguous()
    assert n <= MAX_COLUMNS
    values = scores_RN.new_empty(r, k)
    indices = torch.empty(r, k, dtype=torch.int64, device=scores_RN.device)
    block = triton.next_power_of_2(n)
    _top_k_kernel[(r,)](scores_RN, values, indices, n, k, BLOCK_N=block, num_warps=min(32, max(4, block // 1024)))
    return values, indices


def products(table_ND: Tensor, x_BD: Tensor, latents_P: Tensor, rows_P: Tensor) -> Tensor:
    """`table[latent] . x[row]` of each pair, summed in float32 -> [P] float32."""
    d = x_BD.shape[1]
    out = torch.empty(len(rows_P), dtype=torch.float32, device=x_BD.device)
    block = min(1024, triton.next_power_of_2(d))
    _products_kernel[(len(rows_P),)](table_ND, x_BD, latents_P, rows_P, out, d, BLOCK_D=block, num_warps=2)
    return out


def latent_rows(x_BD: Tensor, rows_P: Tensor, weights_P: Tensor, offsets: Tensor) -> Tensor:
    """For every latent the sum of `weight * x[row]` over its pairs, in float32 -> [N, D] float32."""
    n, d = len(offsets) - 1, x_BD.shape[1]
    out = torch.empty(n, d, dtype=torch.float32, device=x_BD.device)
    block = min(512, triton.next_power_of_2(d))
    grid = (n, triton.cdiv(d, block))
    _latent_rows_kernel[grid](x_BD, rows_P, weights_P, offsets, out, d, BLOCK_D=block, num_warps=4)
    return out
