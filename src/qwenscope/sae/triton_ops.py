"""Triton kernels of an SAE for CUDA: top-k, pair products, weighted sums of rows. Those of training: `triton_step.py`.

Each does what the plain function of the same name in `selection.py` or `ops.py` does, with static launch grids and no
host synchronisation, so that a step can be captured as a CUDA graph; sums have one order, so results are deterministic.
Limits: `top_k` takes bfloat16 rows of at most 65,536 columns, the others float32 or bfloat16. Imported only where
Triton is (CUDA, or its interpreter on a CPU: TRITON_INTERPRET=1).

Legend: R rows of scores, B rows of a batch, D hidden, N latents, K kept per row, G groups of a row's columns, P pairs
(row, latent) sorted by latent.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 65_536
GROUP = 32
"""Most columns per group of the top-k; they are G columns apart, as in `selection.top_k`."""
PER_THREAD = 4
"""Keys of a row that one thread of a top-k kernel holds in registers."""
PAIRS = 8
"""Pairs whose products one program makes, one after the other."""


@triton.jit
def _key(score):  # type: ignore[no-untyped-def]
    """Integers in the order of bfloat16 values, those of equal sign bits next to each other: -0 before +0."""
    bits = score.to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFF, bits)


@triton.jit
def _largest(key, k):  # type: ignore[no-untyped-def]
    """Which k of the keys (at least -32769 each, at least k above that) are the largest, and each one's place.

    bfloat16 has 16 bits: 16 bisections find the k-th largest key exactly. Ties at it go to the first; places come from
    a running count, so that they ascend.
    """
    threshold = tl.full((), -32768, tl.int32)
    for bit in tl.static_range(16):
        higher = threshold + (1 << (15 - bit))
        count = tl.sum((key >= higher).to(tl.int32), axis=0)
        threshold = tl.where(count >= k, higher, threshold)
    above = (key > threshold).to(tl.int32)
    level = (key == threshold).to(tl.int32)
    room = k - tl.sum(above, axis=0)
    taken = (above == 1) | ((level == 1) & (tl.cumsum(level, axis=0) <= room))
    return taken, tl.cumsum(taken.to(tl.int32), axis=0) - 1


@triton.jit  # type: ignore[untyped-decorator]
def _top_k_kernel(  # type: ignore[no-untyped-def]
    scores, chosen, values, indices, n, groups, k, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One program per row: the k groups with the largest maxima, ascending, and of their members the k largest.

    The row is read for its groups and not kept; what is read of it again is still in a cache.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    key = tl.full((BLOCK_G,), -32769, tl.int32)
    for member in tl.static_range(GROUP):
        column = member * groups + group
        inside = (group < groups) & (column < n)
        score = tl.load(scores + row * n + column, mask=inside, other=0.0)
        key = tl.maximum(key, tl.where(inside, _key(score), -32769))
    taken, target = _largest(key, k)
    tl.store(chosen + row * k + target, group, mask=taken)
    tl.debug_barrier()  # other threads of this program read what has been stored
    place = tl.arange(0, GROUP * BLOCK_K)
    slot = place % BLOCK_K
    column = place // BLOCK_K * groups + tl.load(chosen + row * k + slot, mask=slot < k, other=0)
    inside = (slot < k) & (column < n)
    score = tl.load(scores + row * n + column, mask=inside, other=0.0)
    taken, target = _largest(tl.where(inside, _key(score), -32769), k)
    tl.store(values + row * k + target, score, mask=taken)
    tl.store(indices + row * k + target, column.to(tl.int64), mask=taken)


@triton.jit  # type: ignore[untyped-decorator]
def _products_kernel(  # type: ignore[no-untyped-def]
    table, x, latents, rows, out, pairs, d, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program for PAIRS pairs. They are sorted by latent, so the table's row is mostly in the nearest cache."""
    columns = tl.arange(0, BLOCK_D)
    inside = columns < d
    pair = tl.program_id(0) * PAIRS
    stop = tl.minimum(pair + PAIRS, pairs)
    while pair < stop:
        table_row = table + tl.load(latents + pair).to(tl.int64) * d
        x_row = x + tl.load(rows + pair) * d
        left = tl.load(table_row + columns, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + pair, tl.sum(left * right, axis=0))
        pair += 1


@triton.jit  # type: ignore[untyped-decorator]
def _sums_kernel(x, rows, weights, offsets, out, d, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per sum and block of columns: the work of one with many terms is spread over its columns."""
    which = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d
    total = tl.zeros((BLOCK_D,), tl.float32)
    pair, stop = tl.load(offsets + which), tl.load(offsets + which + 1)
    while pair < stop:
        weight = tl.load(weights + pair).to(tl.float32)
        row = tl.load(rows + pair).to(tl.int64)
        total += weight * tl.load(x + row * d + columns, mask=inside, other=0.0).to(tl.float32)
        pair += 1
    tl.store(out + which * d + columns, total, mask=inside)


def top_k(scores_RN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each bfloat16 row -> (values [R, k], indices [R, k] int64), by ascending index.

    In two stages, as `selection.top_k`: the k groups with the largest maxima contain k largest values.
    """
    r, n = scores_RN.shape
    assert scores_RN.dtype == torch.bfloat16
    assert scores_RN.is_contiguous()
    assert k <= n <= MAX_COLUMNS
    values = scores_RN.new_empty(r, k)
    indices = torch.empty(r, k, dtype=torch.int64, device=scores_RN.device)
    chosen = torch.empty(r, k, dtype=torch.int32, device=scores_RN.device)
    block_k, members = triton.next_power_of_2(k), GROUP
    while members > 1 and members * block_k > triton.cdiv(n, members):  # many of few groups: smaller ones
        members //= 2
    groups = triton.cdiv(n, members)
    block_g = triton.next_power_of_2(groups)
    warps = max(_warps(block_g), _warps(members * block_k))
    _top_k_kernel[(r,)](
        scores_RN, chosen, values, indices, n, groups, k,
        GROUP=members, BLOCK_G=block_g, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip
    return values, indices


def _warps(keys: int) -> int:
    """Of a top-k program that holds so many keys, a power of two."""
    return min(16, max(2, keys // (32 * PER_THREAD)))


def products(table_ND: Tensor, x_BD: Tensor, latents_P: Tensor, rows_P: Tensor) -> Tensor:
    """`table[latent] . x[row]` of each pair, summed in float32 -> [P] float32."""
    pairs, d = len(rows_P), x_BD.shape[1]
    out = torch.empty(pairs, dtype=torch.float32, device=x_BD.device)
    block = triton.next_power_of_2(d)
    _products_kernel[(triton.cdiv(pairs, PAIRS),)](
        table_ND, x_BD, latents_P, rows_P, out, pairs, d, PAIRS=PAIRS, BLOCK_D=block, num_warps=row_warps(block)
    )
    return out


def weighted_sums(x_BD: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Sums of `weight * x[row]` over the terms from each offset to the next, in float32 -> [offsets - 1, D] float32."""
    count, d = len(offsets) - 1, x_BD.shape[1]
    out = torch.empty(count, d, dtype=torch.float32, device=x_BD.device)
    block = min(512, triton.next_power_of_2(d))
    grid = (count, triton.cdiv(d, block))
    _sums_kernel[grid](x_BD, rows, weights, offsets, out, d, BLOCK_D=block, num_warps=4)
    return out


def row_warps(block: int) -> int:
    """Of a program that holds a few rows of so many numbers, a power of two."""
    return min(16, max(1, block // 256))
