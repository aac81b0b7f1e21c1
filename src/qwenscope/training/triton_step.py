"""Triton kernels of the training step: what plain torch does in `trainer`, `gradients` and `optimizer`, for CUDA.

Neither gradient matrix ever exists. `GradientRows` holds what one is made of, and one kernel, a program for each
latent, makes its row, projects it, and applies it: Adam, unit norm, shadow. Latents with many pairs are summed in
pieces first. Sums have one order, so results are deterministic; grids are static and nothing waits for the host.

Legend: B rows of a batch, S rows of its gradient (B for each nested prefix), D hidden, N latents, K active latents of
a row, P pairs (row, latent) sorted by latent, M dead latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenscope.sae.ops import Pairs
from qwenscope.sae.triton_ops import row_warps

PIECE = 128
"""Pairs, counted from the first of all, that are summed beforehand where all are of one latent."""
BLOCK_P = 64
"""Pairs that a program of `pair_totals` reads at once."""


@triton.jit
def _centred(x, offset, rms, row, columns, inside, d):  # type: ignore[no-untyped-def]
    """A row as the SAE sees it, in float32: (x - offset) / rms."""
    value = tl.load(x + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    return (value - tl.load(offset + columns, mask=inside, other=0.0)) / tl.load(rms)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_of(source, rows, weights, pair, stop, columns, d, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of weight * source[row] over pairs up to `stop`; rows without weight are not read."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    while pair < stop:
        weight = tl.load(weights + pair)
        width = tl.where(weight == 0, 0, d)
        place = tl.load(rows + pair) * d + columns
        total += weight * tl.load(source + place, mask=columns < width, other=0.0).to(tl.float32)
        pair += 1
    return total


@triton.jit
def _stochastic(value, place, step):  # type: ignore[no-untyped-def]
    """As `optimizer.stochastic_bfloat16`: rounded up or down by a hash of (step, place)."""
    noise = (place.to(tl.int32) + step * -1640531527) * 747796405
    noise = ((noise >> 15) ^ noise) * 277803737
    bits = value.to(tl.int32, bitcast=True) + ((noise >> 16) & 0xFFFF)
    return (bits & -0x10000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit  # type: ignore[untyped-decorator]
def _centre_kernel(  # type: ignore[no-untyped-def]
    x, offset, rms, mean, rows, squares, count, d, BLOCK_D: tl.constexpr
):
    """One program per row: the row centred, its square, and the square of what it deviates from the batch's mean."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < d
    value = _centred(x, offset, rms, row, columns, inside, d)
    deviation = value - _centred(mean, offset, rms, 0, columns, inside, d)
    tl.store(rows + row * d + columns, value, mask=inside)
    tl.store(squares + row, tl.sum(deviation * deviation, axis=0))
    tl.store(squares + count + row, tl.sum(value * value, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _codes_kernel(  # type: ignore[no-untyped-def]
    indices, values, codes, n, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One program per row: its values where their latents are, 0 elsewhere."""
    row = tl.program_id(0).to(tl.int64)
    start = 0
    while start < n:
        columns = start + tl.arange(0, BLOCK_N)
        tl.store(codes + row * n + columns, tl.zeros((BLOCK_N,), tl.bfloat16), mask=columns < n)
        start += BLOCK_N
    tl.debug_barrier()  # all zeros are there before any value
    place = tl.arange(0, BLOCK_K)
    inside = place < K
    latent = tl.load(indices + row * K + place, mask=inside, other=0)
    value = tl.load(values + row * K + place, mask=inside, other=0.0)
    tl.store(codes + row * n + latent, value.to(tl.bfloat16), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _errors_kernel(  # type: ignore[no-untyped-def]
    x, offset, rms, table, indices, values, x_hats, errors, squares, d, K: tl.constexpr, MADE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per row: x_hat - x of the centred row, in float32, and its square; x_hat may be MADE already."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < d
    if MADE:
        x_hat = tl.load(x_hats + row * d + columns, mask=inside, other=0.0)
    else:
        x_hat = _sum_of(table, indices, values, row * K, row * K + K, columns, d, BLOCK_D)
    error = x_hat - _centred(x, offset, rms, row, columns, inside, d)
    tl.store(errors + row * d + columns, error, mask=inside)
    tl.store(squares + row, tl.sum(error * error, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _totals_kernel(  # type: ignore[no-untyped-def]
    values, deltas, x_rows, g_rows, x_squares, g_norms, offsets, totals, fired, n, BLOCK_P: tl.constexpr
):
    """One program per latent: sums over its active pairs; the delta of pairs that are not becomes 0."""
    latent = tl.program_id(0)
    first, stop = tl.load(offsets + latent), tl.load(offsets + latent + 1)
    bias = tl.zeros((BLOCK_P,), tl.float32)
    decoder = tl.zeros((BLOCK_P,), tl.float32)
    encoder = tl.zeros((BLOCK_P,), tl.float32)
    active = tl.zeros((BLOCK_P,), tl.int32)
    while first < stop:
        pair = first + tl.arange(0, BLOCK_P)
        inside = pair < stop
        value = tl.load(values + pair, mask=inside, other=0.0)
        delta = tl.where(value > 0, tl.load(deltas + pair, mask=inside, other=0.0), 0.0)
        x_square = tl.load(x_squares + tl.load(x_rows + pair, mask=inside, other=0), mask=inside, other=0.0)
        g_norm = tl.load(g_norms + tl.load(g_rows + pair, mask=inside, other=0), mask=inside, other=0.0)
        tl.store(deltas + pair, delta, mask=inside)
        bias += delta
        decoder += value * g_norm
        encoder += tl.abs(delta) * tl.sqrt(x_square)
        active += (value > 0).to(tl.int32)
        first += BLOCK_P
    tl.store(totals + latent, tl.sum(bias, axis=0))
    tl.store(totals + n + latent, tl.sum(decoder, axis=0))
    tl.store(totals + 2 * n + latent, tl.sum(encoder, axis=0))
    tl.store(fired + latent, (tl.sum(active, axis=0) > 0).to(tl.uint8))


@triton.jit  # type: ignore[untyped-decorator]
def _pieces_kernel(  # type: ignore[no-untyped-def]
    source, rows, weights, latents, pieces, d, PIECE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program per piece: the sum of its pairs, if all are of one latent."""
    piece = tl.program_id(0).to(tl.int64)
    first = piece * PIECE
    if tl.load(latents + first) == tl.load(latents + first + PIECE - 1):
        columns = tl.arange(0, BLOCK_D)
        inside = columns < d
        total = _sum_of(source, rows, weights, first, first + PIECE, columns, d, BLOCK_D)
        tl.store(pieces + piece * d + columns, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _latents_kernel(  # type: ignore[no-untyped-def]
    source, rows, weights, offsets, pieces, slots, extra, parameter, means, squares, shadow, bound, lr, corrections,
    divisor, finite, step, out, beta1, beta2, eps, clip_norm, d,
    PIECE: tl.constexpr, EXTRA: tl.constexpr, UNIT: tl.constexpr, UPDATE: tl.constexpr, SHADOW: tl.constexpr,
    ROUNDED: tl.constexpr, CAUTIOUS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per latent: its gradient row, the row's square, and (UPDATE) one step on it; all is read once."""
    if not UPDATE:  # noqa: SIM102 (known at compilation)
        if tl.load(bound) <= clip_norm:  # no norm is needed
            return
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < d
    places = latent * d + columns
    pair, stop = tl.load(offsets + latent), tl.load(offsets + latent + 1)
    piece = (pair + PIECE - 1) // PIECE
    whole = tl.minimum(piece * PIECE, stop)
    row = _sum_of(source, rows, weights, pair, whole, columns, d, BLOCK_D)
    while whole + PIECE <= stop:
        row += tl.load(pieces + piece * d + columns, mask=inside, other=0.0)
        piece += 1
        whole += PIECE
    row += _sum_of(source, rows, weights, whole, stop, columns, d, BLOCK_D)
    if EXTRA:
        slot = tl.load(slots + latent)
        row += tl.load(extra + slot * d + columns, mask=columns < tl.where(slot < 0, 0, d), other=0.0)
    if UNIT:
        direction = tl.load(parameter + places, mask=inside, other=0.0)
        row -= tl.sum(row * direction, axis=0) * direction
    tl.store(out + latent, tl.sum(row * row, axis=0))
    if UPDATE:
        kept = columns < d * tl.load(finite).to(tl.int32)  # none where the step is not finite
        rate = tl.load(lr) / tl.load(corrections).to(tl.float32)
        scale = 1 / tl.sqrt(tl.load(corrections + 1).to(tl.float32))
        row = row / tl.load(divisor)
        mean = tl.load(means + places, mask=inside, other=0.0).to(tl.float32) * beta1 + row * (1 - beta1)
        square = tl.load(squares + places, mask=inside, other=0.0).to(tl.float32) * beta2 + row * row * (1 - beta2)
        value = tl.load(parameter + places, mask=inside, other=0.0)
        change = rate * mean / (tl.sqrt(square) * scale + eps)
        if CAUTIOUS:
            change = tl.where(mean * row > 0, change, 0.0)
        value -= change
        if UNIT:
            value = value / tl.sqrt(tl.sum(value * value, axis=0))
        tl.store(means + places, mean, mask=kept)
        if ROUNDED:
            square = _stochastic(square, places, tl.load(step).to(tl.int32))
        tl.store(squares + places, square, mask=kept)
        tl.store(parameter + places, value, mask=kept)
        if SHADOW:
            tl.store(shadow + places, value, mask=kept)


def centre(x_BD: Tensor, offset_D: Tensor, rms: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x - offset) / rms in `dtype` [B, D], and of each such row in float32 [2, B]: squared deviation from the rows'
    mean, square.
    """
    rows, d = x_BD.shape
    centred_BD = x_BD.new_empty(rows, d, dtype=dtype)
    squares_2B = offset_D.new_empty(2, rows)
    mean_D, block = x_BD.mean(0, dtype=torch.float32), triton.next_power_of_2(d)
    _centre_kernel[(rows,)](
        x_BD, offset_D, rms, mean_D, centred_BD, squares_2B, rows, d, BLOCK_D=block, num_warps=row_warps(block)
    )
    return centred_BD, squares_2B


def codes(indices_BK: Tensor, values_BK: Tensor, n: int) -> Tensor:
    """All N codes of each row in bfloat16 [B, N]; a row names no latent twice."""
    rows, k = indices_BK.shape
    codes_BN = torch.empty(rows, n, dtype=torch.bfloat16, device=values_BK.device)
    _codes_kernel[(rows,)](
        indices_BK, values_BK, codes_BN, n,
        K=k, BLOCK_K=triton.next_power_of_2(k), BLOCK_N=min(2048, triton.next_power_of_2(n)), num_warps=4,
    )  # fmt: skip
    return codes_BN


def errors(
    x_BD: Tensor,
    offset_D: Tensor,
    rms: Tensor,
    table_ND: Tensor,
    indices_BK: Tensor,
    values_BK: Tensor,
    x_hat_BD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the weighted rows of `table`, or `x_hat` (float32) where their sum is known, miss of `centre`'s rows:
    x_hat - x [B, D] in the table's dtype, and each row's square [B], both of float32 sums.
    """
    rows, k = indices_BK.shape
    errors_BD, squares_B = table_ND.new_empty(rows, x_BD.shape[1]), offset_D.new_empty(rows)
    block = triton.next_power_of_2(x_BD.shape[1])
    _errors_kernel[(rows,)](
        x_BD, offset_D, rms, table_ND, indices_BK, values_BK, x_hat_BD, errors_BD, squares_B, x_BD.shape[1],
        K=k, MADE=x_hat_BD is not None, BLOCK_D=block, num_warps=row_warps(block),
    )  # fmt: skip
    return errors_BD, squares_B


def pair_totals(
    pairs: Pairs, towards: Pairs, values_P: Tensor, delta_P: Tensor, x_squares_B: Tensor, g_norm_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Of each latent [3, N] the sums of delta, value * |g| and |delta| * |x| over its pairs, and whether it fired [N].

    The gradient's row of a latent is no longer than its two last sums (triangle inequality). `delta_P` becomes 0 where
    the value is.
    """
    n = len(pairs.offsets) - 1
    totals_3N, fired_N = values_P.new_empty(3, n), torch.empty(n, dtype=torch.uint8, device=values_P.device)
    _totals_kernel[(n,)](
        values_P, delta_P, pairs.rows, towards.rows, x_squares_B, g_norm_S, pairs.offsets, totals_3N, fired_N, n,
        BLOCK_P=BLOCK_P, num_warps=1,
    )  # fmt: skip
    return totals_3N, fired_N.view(torch.bool)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Of one Adam step, all read on the device and 0-dim but for `corrections`.

    lr: float32. corrections: [2] float64, 1 - beta^step of both. divisor: float32, of the gradient. finite: bool; where
    it is false nothing changes. step: float32, from 1.
    """

    lr: Tensor
    corrections: Tensor
    divisor: Tensor
    finite: Tensor
    step: Tensor
    betas: tuple[float, float]
    eps: float
    cautious: bool

    @property
    def read(self) -> tuple[Tensor, ...]:
        """As the kernel takes them."""
        return self.lr, self.corrections, self.divisor, self.finite, self.step


class GradientRows:
    """What the gradient of one matrix is made of: row n is the sum of weight * source[row] over the pairs of latent n.

    Args:
        source: [B, D] or [S, D], float32 or bfloat16.
        pairs: with rows of `source`.
        weights_P: float32.
        extra: rows [M, D] to add, and of each latent which one (int32 [N], -1 for none).
    """

    def __init__(self, source: Tensor, pairs: Pairs, weights_P: Tensor, extra: tuple[Tensor, Tensor] | None) -> None:
        self.source, self.pairs, self.weights_P, self.extra = source, pairs, weights_P, extra
        self.block = triton.next_power_of_2(source.shape[1])
        count = len(weights_P) // PIECE
        self.pieces = source.new_empty(count, source.shape[1], dtype=torch.float32)
        if count:
            _pieces_kernel[(count,)](
                source, pairs.rows, weights_P, pairs.latents, self.pieces, source.shape[1],
                PIECE=PIECE, BLOCK_D=self.block, num_warps=row_warps(self.block),
            )  # fmt: skip

    def squares(self, parameter_ND: Tensor, out_N: Tensor, bound: Tensor, clip_norm: float, unit: bool) -> None:
        """Write the square of each row, without its part along the parameter's (if `unit`), to `out`; nothing if
        `bound` (0-dim, of the whole gradient's norm) is at most `clip_norm`.
        """
        self._launch(out_N, unit, parameter_ND, bound=bound, clip_norm=clip_norm)

    def step(
        self,
        parameter_ND: Tensor,
        moments: tuple[Tensor, Tensor],
        shadow_ND: Tensor | None,
        out_N: Tensor,
        numbers: Numbers,
        unit: bool,
    ) -> None:
        """Adam on rows in float32, in place, and their gradient's squares (undivided) to `out`.

        Args:
            moments: first and second one, float32, or bfloat16 with the second one rounded stochastically.
            shadow_ND: a copy in bfloat16 to bring up to date.
            unit: take the part along the parameter's rows from the gradient, and give each of those unit norm.
        """
        self._launch(out_N, unit, parameter_ND, moments, shadow_ND, numbers)

    def _launch(
        self,
        out_N: Tensor,
        unit: bool,
        parameter_ND: Tensor,
        moments: tuple[Tensor | None, Tensor | None] = (None, None),
        shadow_ND: Tensor | None = None,
        numbers: Numbers | None = None,
        bound: Tensor | None = None,
        clip_norm: float = 0.0,
    ) -> None:
        extra_MD, slots_N = self.extra or (None, None)
        read = (None,) * 5 if numbers is None else numbers.read
        beta1, beta2, eps = (0.0, 0.0, 0.0) if numbers is None else (*numbers.betas, numbers.eps)
        warps = row_warps(self.block if numbers else 2 * self.block)  # versions of Triton spill the norm's otherwise
        _latents_kernel[(len(parameter_ND),)](
            self.source, self.pairs.rows, self.weights_P, self.pairs.offsets, self.pieces, slots_N, extra_MD,
            parameter_ND, *moments, shadow_ND, bound, *read, out_N, beta1, beta2, eps, clip_norm, self.source.shape[1],
            PIECE=PIECE, EXTRA=self.extra is not None, UNIT=unit, UPDATE=numbers is not None,
            SHADOW=shadow_ND is not None, ROUNDED=moments[0] is not None and moments[0].dtype == torch.bfloat16,
            CAUTIOUS=numbers is not None and numbers.cautious, BLOCK_D=self.block, num_warps=warps,
        )  # fmt: skip
