"""Adam (Kingma & Ba 2015) with a unit-norm decoder, applied block by block so that the full gradient never exists.

Each block of rows is computed, projected, stepped, normalised and copied to its shadow while it is in cache. The result
equals `torch.optim.Adam` on the dense gradient: every row decays its moments in each step, whether it has pairs or not.

A cautious step (Liang et al. 2024, arXiv 2411.16085, without their rescaling) leaves those entries of encoder and
decoder as they are whose mean points another way than the batch's own gradient. A latent that is silent in a batch
stands still in it, instead of drifting on old momentum.

Legend: D hidden, N latents, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwenscope.sae import ops
from qwenscope.training.gradients import SparseGradient
from qwenscope.training.weights import Weights

BLOCK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Adam:
    """Settings of one Adam step.

    lr: 0-dim, in the parameters' dtype. step: 0-dim float32, number of this step from 1, for the bias corrections.
    cautious: leave an entry as it is where its mean and its gradient differ in sign.
    """

    lr: Tensor
    betas: tuple[float, float]
    eps: float
    step: Tensor
    cautious: bool = False

    def __call__(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
        divisor: Tensor,
        skip: Tensor,
    ) -> None:
        """Update each parameter, mean and square in place with g = gradient / `divisor`; the gradients are spent.

            mean   <- beta1 mean + (1 - beta1) g        square <- beta2 square + (1 - beta2) g^2
            parameter <- parameter - lr (mean / (1 - beta1^step)) / (sqrt(square / (1 - beta2^step)) + eps)

        Moments in bfloat16 are widened for the step and rounded after it. `divisor`: 0-dim, in the parameters' dtype.
        `skip`: 0-dim float32 read on the device; 1 leaves everything as it is.
        """
        dtype = parameters[0].dtype
        if dtype == torch.float64:  # the kernel would read the divisor as float32
            for gradient in gradients:
                gradient.div_(divisor)
            divisor = torch.ones_like(divisor)
        first, second = [mean.to(dtype) for mean in means], [square.to(dtype) for square in squares]
        before = [parameter.clone() for parameter in parameters] if self.cautious else []
        torch._fused_adam_(
            parameters,
            gradients,
            first,
            second,
            [],
            [self.step] * len(parameters),
            lr=self.lr.float() if self.lr.is_cuda else self.lr,  # CUDA's kernel reads a float32
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor.float(),
            found_inf=skip,
        )
        for parameter, old, gradient, mean in zip(parameters, before, gradients, first, strict=bool(before)):
            torch.lerp(old, parameter, gradient.mul_(mean).gt_(0), out=parameter)  # faster than `where`, and exact
        if means[0].dtype != dtype:
            for mean, square, wide_mean, wide_square in zip(means, squares, first, second, strict=True):
                mean.copy_(wide_mean)
                square.copy_(stochastic_bfloat16(wide_square, self.step))


def stochastic_bfloat16(x: Tensor, step: Tensor) -> Tensor:
    """Round up or down to bfloat16, by way of float32, with probabilities that keep the mean.

    The noise is a function of (step, place).

    The second moment needs it: with beta2 = 0.999 nearly all its changes are below half a unit in the last place, and
    rounding to nearest would freeze it at its maximum.
    """
    place = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    noise = (place + step.to(torch.int32) * -1640531527) * 747796405  # a multiplicative hash; wraps around
    noise = ((noise >> 15) ^ noise) * 277803737
    bits = x.float().view(torch.int32) + ((noise >> 16) & 0xFFFF)
    return (bits & -0x10000).view(torch.float32).bfloat16()


def _blocks(weights: Weights, gradient: SparseGradient) -> Iterator[tuple[str, slice, Tensor]]:
    """(matrix, rows, their gradient), the decoder's without its part along each unit row d: g - <g, d> d."""
    n = weights.latents
    size = n if weights["decoder"].is_cuda else BLOCK_ROWS
    for start in range(0, n, size):
        block = slice(start, min(start + size, n))
        for name in ("encoder", "decoder"):
            rows_RD = gradient.rows(name, block.start, block.stop)
            if name == "decoder":
                decoder_RD = weights["decoder"][block]
                along_R = torch.linalg.vecdot(rows_RD, decoder_RD)
                rows_RD.addcmul_(decoder_RD, along_R.unsqueeze(1), value=-1)
            yield name, block, rows_RD


def update(weights: Weights, gradient: SparseGradient, adam: Adam, clip_norm: float | None, finite: Tensor) -> Tensor:
    """One Adam step on all parameters; returns the gradient's norm after projection, before clipping.

    Clipping to `clip_norm` is exact. A GPU holds both gradient matrices and so has their norm before it divides; a CPU
    makes them block by block, twice where the gradient's bound does not exclude a norm above `clip_norm`.
    Where `finite` (0-dim bool) is false nothing changes.
    """
    if ops.fused(weights["decoder"]):
        return _update_by_kernels(weights, gradient, adam, clip_norm, finite)
    of_biases = gradient.encoder_bias.norm(), gradient.pre_bias.norm()
    of_rows: list[Tensor] = []
    norm_of_all: Tensor | None = None
    divisor = torch.ones_like(gradient.bound)
    blocks: Iterable[tuple[str, slice, Tensor]] = _blocks(weights, gradient)
    on_gpu = finite.is_cuda
    if on_gpu:
        blocks = list(blocks)
    if clip_norm is not None and (on_gpu or bool(gradient.bound > clip_norm)):
        known = blocks if on_gpu else _blocks(weights, gradient)
        norm_of_all = weights.norm(*of_biases, [rows_RD.norm() for _, _, rows_RD in known])
        divisor = (norm_of_all / clip_norm).clamp_min(1.0)
    skip = (~finite).float()
    for name, block, rows_RD in blocks:
        if norm_of_all is None:
            of_rows.append(rows_RD.norm())
        parameter = weights[name][block]
        adam([parameter], [rows_RD], [weights.means[name][block]], [weights.squares[name][block]], divisor, skip)
        if name == "decoder":
            length_R = torch.linalg.vector_norm(parameter, dim=1, keepdim=True)
            parameter.mul_(torch.where(finite, 1 / length_R, 1.0))
        weights.refresh(name, block)
    _update_biases(weights, gradient, adam, divisor, skip)
    return weights.norm(*of_biases, of_rows) if norm_of_all is None else norm_of_all


def _update_biases(weights: Weights, gradient: SparseGradient, adam: Adam, divisor: Tensor, skip: Tensor) -> None:
    parameters, means, squares = (
        [of["encoder_bias"], of["pre_bias"]] for of in (weights.parameters, weights.means, weights.squares)
    )
    plain = replace(adam, cautious=False)  # biases have no place in a latent's direction, and need their momentum
    plain(parameters, [gradient.encoder_bias, gradient.pre_bias], means, squares, divisor, skip)


def _update_by_kernels(
    weights: Weights, gradient: SparseGradient, adam: Adam, clip_norm: float | None, finite: Tensor
) -> Tensor:
    """As `update`, on a GPU: one kernel for each matrix, another for its norm, which returns at once where the
    gradient's bound excludes a norm above `clip_norm`.
    """
    from qwenscope.training.triton_step import Numbers

    rows = {name: gradient.unmade(name) for name in ("encoder", "decoder")}
    of_biases = gradient.encoder_bias.norm(), gradient.pre_bias.norm()
    squares_2N = gradient.encoder_bias.new_zeros(2, weights.latents)
    if clip_norm is None:
        divisor = torch.ones_like(gradient.bound)
    else:
        for (name, unmade), out_N in zip(rows.items(), squares_2N, strict=True):
            unmade.squares(weights[name], out_N, gradient.bound, clip_norm, unit=name == "decoder")
        norm = weights.norm(*of_biases, [squares_2N.sum().sqrt()])
        divisor = (norm / clip_norm).clamp_min(1.0)
    step = adam.step.double()
    corrections = 1 - torch.stack([beta**step for beta in adam.betas])
    numbers = Numbers(adam.lr, corrections, divisor, finite, adam.step, adam.betas, adam.eps, adam.cautious)
    for (name, unmade), out_N in zip(rows.items(), squares_2N, strict=True):
        shadow, moments = weights.shadows.get(name), (weights.means[name], weights.squares[name])
        assert shadow is None or isinstance(shadow, Tensor)
        unmade.step(weights[name], moments, shadow, out_N, numbers, unit=name == "decoder")
    _update_biases(weights, gradient, adam, divisor, torch.logical_not(finite, out=torch.empty_like(divisor)))
    return weights.norm(*of_biases, [squares_2N.sum().sqrt()])
