"""Triton kernels of the training step for CUDA: top-k, pair products, weighted sums of rows, Adam.

Each does what the plain function of the same name in `selection.py`, `ops.py` or `training/optimizer.py` does, with
static launch grids and no host synchronisation, so that a step can be captured as a CUDA graph; sums have one order, so
results are deterministic. Limits: `top_k` takes bfloat16 rows of at most 65,536 columns, the others float32 or
bfloat16. Imported only where Triton is (CUDA, or its interpreter on a CPU: TRITON_INTERPRET=1).

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
PER_THREAD = 8
"""Keys of a row that one thread of a top-k kernel holds in registers."""


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
def _groups_kernel(scores, chosen, n, groups, k, GROUP: tl.constexpr, BLOCK_G: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row: the k groups with the largest maxima, ascending. A row is read once and not kept."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    key = tl.full((BLOCK_G,), -32769, tl.int32)
    for member in tl.static_range(GROUP):
        column = member * groups + group
        inside = (group < groups) & (column < n)
        score = tl.load(scores + row * n + column, mask=inside, other=0.0)
        key = tl.maximum(key, tl.where(inside, _key(score), -32769))
    taken, place = _largest(key, k)
    tl.store(chosen + row * k + place, group, mask=taken)


@triton.jit  # type: ignore[untyped-decorator]
def _members_kernel(  # type: ignore[no-untyped-def]
    scores, chosen, values, indices, n, groups, k, GROUP: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One program per row: the k largest members of its chosen groups. Groups ascend, so columns do, too."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, GROUP * BLOCK_K)
    slot = place % BLOCK_K
    group = tl.load(chosen + row * k + slot, mask=slot < k, other=0)
    column = place // BLOCK_K * groups + group
    inside = (slot < k) & (column < n)
    score = tl.load(scores + row * n + column, mask=inside, other=0.0)
    taken, target = _largest(tl.where(inside, _key(score), -32769), k)
    tl.store(values + row * k + target, score, mask=taken)
    tl.store(indices + row * k + target, column.to(tl.int64), mask=taken)


@triton.jit  # type: ignore[untyped-decorator]
def _products_kernel(table, x, latents, rows, out, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per pair. Pairs are sorted by latent, so the table's row is mostly in cache."""
    pair = tl.program_id(0)
    table_row = table + tl.load(latents + pair).to(tl.int64) * D
    x_row = x + tl.load(rows + pair).to(tl.int64) * D
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D
        left = tl.load(table_row + columns, mask=inside, other=0.0).to(tl.float32)
        total += left * tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + pair, tl.sum(total, axis=0))


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


@triton.jit  # type: ignore[untyped-decorator]
def _project_kernel(gradient, decoder, squares, d, PROJECT: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per latent: its gradient row without the part along its unit decoder row, and that row's square."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < d
    places = latent * d + columns
    row = tl.load(gradient + places, mask=inside, other=0.0)
    if PROJECT:
        direction = tl.load(decoder + places, mask=inside, other=0.0)
        row -= tl.sum(row * direction, axis=0) * direction
        tl.store(gradient + places, row, mask=inside)
    tl.store(squares + latent, tl.sum(row * row, axis=0))


@triton.jit
def _stochastic(value, place, step):  # type: ignore[no-untyped-def]
    """As `stochastic_bfloat16`: rounded up or down by a hash of (step, place)."""
    noise = (place.to(tl.int32) + step * -1640531527) * 747796405
    noise = ((noise >> 15) ^ noise) * 277803737
    bits = value.to(tl.int32, bitcast=True) + ((noise >> 16) & 0xFFFF)
    return (bits & -0x10000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit  # type: ignore[untyped-decorator]
def _adam_kernel(  # type: ignore[no-untyped-def]
    parameter, gradient, means, squares, shadow, numbers, beta1, beta2, eps, d,
    UNIT: tl.constexpr, SHADOW: tl.constexpr, ROUNDED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per latent: moments, parameter, unit norm and shadow of its row, each read and written once."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    places = latent * d + columns
    inside = columns < d
    rate, scale, divisor = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    kept = columns < (d * tl.load(numbers + 3)).to(tl.int32)  # none where the step is not finite
    row = tl.load(gradient + places, mask=inside, other=0.0) / divisor
    mean = tl.load(means + places, mask=inside, other=0.0).to(tl.float32) * beta1 + row * (1 - beta1)
    square = tl.load(squares + places, mask=inside, other=0.0).to(tl.float32) * beta2 + row * row * (1 - beta2)
    value = tl.load(parameter + places, mask=inside, other=0.0)
    value -= rate * mean / (tl.sqrt(square) * scale + eps)
    if UNIT:
        value = value / tl.sqrt(tl.sum(value * value, axis=0))
    if ROUNDED:
        tl.store(means + places, mean.to(tl.bfloat16), mask=kept)
        step = tl.load(numbers + 4).to(tl.int32)
        tl.store(squares + places, _stochastic(square, places, step), mask=kept)
    else:
        tl.store(means + places, mean, mask=kept)
        tl.store(squares + places, square, mask=kept)
    tl.store(parameter + places, value, mask=kept)
    if SHADOW:
        tl.store(shadow + places, value.to(tl.bfloat16), mask=kept)


def top_k(scores_RN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each bfloat16 row -> (values [R, k], indices [R, k] int64), by ascending index.

    Two kernels, as `selection.top_k`: the k groups with the largest maxima contain k largest values.
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
    _groups_kernel[(r,)](scores_RN, chosen, n, groups, k, GROUP=members, BLOCK_G=block_g, num_warps=_warps(block_g))
    _members_kernel[(r,)](
        scores_RN, chosen, values, indices, n, groups, k,
        GROUP=members, BLOCK_K=block_k, num_warps=_warps(members * block_k),
    )  # fmt: skip
    return values, indices


def _warps(keys: int) -> int:
    """Of a top-k program that holds so many keys, a power of two."""
    return min(16, max(2, keys // (32 * PER_THREAD)))


def products(table_ND: Tensor, x_BD: Tensor, latents_P: Tensor, rows_P: Tensor) -> Tensor:
    """`table[latent] . x[row]` of each pair, summed in float32 -> [P] float32."""
    d = x_BD.shape[1]
    out = torch.empty(len(rows_P), dtype=torch.float32, device=x_BD.device)
    block = min(1024, triton.next_power_of_2(d))
    _products_kernel[(len(rows_P),)](table_ND, x_BD, latents_P, rows_P, out, D=d, BLOCK_D=block, num_warps=2)
    return out


def weighted_sums(x_BD: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Sums of `weight * x[row]` over the terms from each offset to the next, in float32 -> [offsets - 1, D] float32."""
    count, d = len(offsets) - 1, x_BD.shape[1]
    out = torch.empty(count, d, dtype=torch.float32, device=x_BD.device)
    block = min(512, triton.next_power_of_2(d))
    grid = (count, triton.cdiv(d, block))
    _sums_kernel[grid](x_BD, rows, weights, offsets, out, d, BLOCK_D=block, num_warps=4)
    return out


def project(gradient_ND: Tensor, decoder_ND: Tensor | None) -> Tensor:
    """Take from each row its part along the unit row of `decoder`, in place -> squares of the rows [N], all float32."""
    n, d = gradient_ND.shape
    squares = gradient_ND.new_empty(n)
    block = triton.next_power_of_2(d)
    direction = gradient_ND if decoder_ND is None else decoder_ND
    _project_kernel[(n,)](
        gradient_ND, direction, squares, d, PROJECT=decoder_ND is not None, BLOCK_D=block, num_warps=_row_warps(block)
    )
    return squares


def adam(
    parameter_ND: Tensor,
    gradient_ND: Tensor,
    means_ND: Tensor,
    squares_ND: Tensor,
    shadow_ND: Tensor | None,
    numbers: Tensor,
    betas: tuple[float, float],
    eps: float,
    unit: bool,
) -> None:
    """Adam on rows in float32, in place; moments may be in bfloat16, the second one rounded stochastically.

    Args:
        shadow_ND: a copy in bfloat16 to bring up to date.
        numbers: [5] float32, read on the device: lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step), what divides the
            gradient, 1 where the step is finite (else nothing changes), and step.
        unit: give each row unit norm.
    """
    n, d = parameter_ND.shape
    block = triton.next_power_of_2(d)
    _adam_kernel[(n,)](
        parameter_ND, gradient_ND, means_ND, squares_ND, parameter_ND if shadow_ND is None else shadow_ND, numbers,
        *betas, eps, d,
        UNIT=unit, SHADOW=shadow_ND is not None, ROUNDED=means_ND.dtype == torch.bfloat16, BLOCK_D=block,
        num_warps=_row_warps(block),
    )  # fmt: skip


def _row_warps(block: int) -> int:
    """Of a program that holds a few rows of so many numbers, a power of two."""
    return min(16, max(1, block // 256))
