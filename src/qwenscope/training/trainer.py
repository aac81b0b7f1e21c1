"""Train one TopK SAE: `SAETrainer.step` is one optimiser step on plain tensors, without autograd.

Loss (Gao et al. 2024, eq. 3 and section A.2, with a batch-relative reconstruction term):

    FVU = sum ||x - x_hat||^2 / sum ||x - mean_batch(x)||^2            aux = ||e - e_hat||^2 / ||e - mean(e)||^2
    loss = FVU + aux_coefficient * aux, where e = x - x_hat (held fixed) and e_hat decodes the aux_k largest
    pre-activations, without ReLU, among the latents that are dead.

Legend: B rows (tokens), D hidden, N latents, K active latents per row, M dead latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qwenscope.errors import CheckpointError, TrainingError
from qwenscope.sae import ops
from qwenscope.sae.topk import TopKSAE
from qwenscope.seeds import generator
from qwenscope.training.dead_latents import FiringAges, ResamplingPool
from qwenscope.training.optimizer import Adam
from qwenscope.training.schedule import learning_rate

Precision = Literal["auto", "exact", "fp32", "bf16"]
PRECISIONS: tuple[Literal["exact", "fp32", "bf16"], ...] = ("exact", "fp32", "bf16")
PARAMETERS = ("encoder", "encoder_bias", "decoder", "pre_bias")
POOL_STEPS = 100
"""Steps before a resampling whose rows may become directions."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step saw, before its update. All but `lr` are 0-dim tensors on the trainer's device (reading one syncs).

    fvu: fraction of variance unexplained of the batch. loss: fvu + aux_coefficient * aux_loss. aux_loss: 0 without
    dead latents. l0: mean number of values above 0 per row. dead: number of dead latents. grad_norm: of all parameters,
    after the decoder's projection, before clipping. finite: whether loss and gradients were; if not, nothing changed.
    """

    fvu: Tensor
    loss: Tensor
    aux_loss: Tensor
    l0: Tensor
    dead: Tensor
    grad_norm: Tensor
    finite: Tensor
    lr: float


class SAETrainer:
    """Trains a copy of `sae`; usable alone, on anyone's activations.

    Args:
        sae: the starting point; its device is the trainer's.
        lr: peak learning rate.
        tokens: tokens of the whole run; None means constant rate after warmup.
        warmup_tokens, decay_share: see `schedule.learning_rate`.
        aux_coefficient: weight of the dead-latent loss; 0 switches it off.
        aux_k: dead latents used per row; None means D // 2.
        dead_after_tokens: tokens without firing that make a latent dead; None means 2 % of `tokens`, or 1,000,000.
        resample_every_steps: re-initialise dead latents that often; 0 switches it off.
        normalise: centre and scale rows by `calibrate`'s mean and rms, folded into the weights by `sae()`.
        precision: "fp32", "bf16", "exact" (bf16 candidates, float32 values and gradients) or "auto".
        betas, eps: Adam's.
        clip_norm: largest gradient norm over all parameters; None switches clipping off.
        moments: dtype of Adam's moments.
        seed: of the resampling.

    Raises:
        TrainingError: an impossible value.
    """

    def __init__(
        self,
        sae: TopKSAE,
        lr: float,
        *,
        tokens: int | None = None,
        warmup_tokens: int = 0,
        decay_share: float = 0.2,
        aux_coefficient: float = 1 / 32,
        aux_k: int | None = None,
        dead_after_tokens: int | None = None,
        resample_every_steps: int = 0,
        normalise: bool = False,
        precision: Precision = "auto",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 6.25e-10,
        clip_norm: float | None = 1.0,
        moments: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        if lr < 0 or not 0 <= decay_share <= 1 or (clip_norm is not None and clip_norm <= 0):
            raise TrainingError(
                f"lr={lr}, decay_share={decay_share}, clip_norm={clip_norm}: not a possible training step"
            )
        self.config = dict(sae.config)
        self.k = sae.k
        self.device = sae.pre_bias.device
        self.lr, self.tokens, self.warmup_tokens, self.decay_share = lr, tokens, warmup_tokens, decay_share
        self.aux_coefficient = aux_coefficient
        self.aux_k = sae.hidden_dim // 2 if aux_k is None else aux_k
        self.betas, self.eps, self.clip_norm = betas, eps, clip_norm
        self.resample_every_steps = resample_every_steps
        self.precision = "fp32" if precision == "auto" else precision
        self.normalise = normalise
        self.parameters = {
            "encoder": sae.encoder.weight.detach().float().contiguous().clone(),
            "encoder_bias": sae.encoder.bias.detach().float().clone(),
            "decoder": sae.decoder.weight.detach().float().T.contiguous().clone(),
            "pre_bias": sae.pre_bias.detach().float().clone(),
        }
        self.means = {name: torch.zeros_like(value, dtype=moments) for name, value in self.parameters.items()}
        self.squares = {name: torch.zeros_like(value, dtype=moments) for name, value in self.parameters.items()}
        self.centre_D = torch.zeros(sae.hidden_dim, device=self.device)
        self.rms = torch.ones((), device=self.device)
        if dead_after_tokens is None:
            dead_after_tokens = 1_000_000 if tokens is None else max(1, tokens // 50)
        self.ages = FiringAges(sae.dict_size, dead_after_tokens, self.device)
        self.pool: ResamplingPool | None = None
        if resample_every_steps:
            per_step = max(1, sae.dict_size // (4 * min(POOL_STEPS, resample_every_steps)))
            size = per_step * min(POOL_STEPS, resample_every_steps)
            self.pool = ResamplingPool(size, sae.hidden_dim, per_step, self.device)
        self.generator = generator(seed, "resampling")
        self.steps = 0
        self.tokens_trained = 0

    def calibrate(self, rows_RD: Tensor) -> None:
        """Fit what does not need training, on the first rows of a run: centre, scale, and the encoder's length.

        pre_bias becomes the rows' mean; with `normalise`, rows are from now on centred by that mean and divided by
        their rms deviation per element, and pre_bias starts at 0. The encoder becomes c times the decoder, with c by least
        squares of the reconstruction on these rows (codes are homogeneous in c).
        """
        rows = rows_RD.to(self.device, torch.float32)
        mean_D = rows.mean(0)
        if self.normalise:
            self.centre_D = mean_D
            self.rms = (rows - mean_D).square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        else:
            self.parameters["pre_bias"].copy_(mean_D)
        decoder = self.parameters["decoder"]
        target = fitted = torch.zeros((), device=self.device)
        for chunk in torch.split(rows, 1024):
            x = self._rows(chunk)
            values, indices = (x @ decoder.T).topk(self.k, dim=1, sorted=False)
            x_hat = ops.weighted_rows(decoder, indices, values.relu())
            target = target + (x * x_hat).sum()
            fitted = fitted + x_hat.square().sum()
        self.parameters["encoder"].copy_(decoder * torch.where(fitted > 0, target / fitted, 1.0))

    def _rows(self, x_BD: Tensor) -> Tensor:
        """What the encoder multiplies: normalised rows less pre_bias, float32."""
        x = x_BD.to(self.device, torch.float32)
        if self.normalise:
            x = (x - self.centre_D) / self.rms
        return x - self.parameters["pre_bias"]

    @torch.no_grad()
    def step(self, x_BD: Tensor) -> StepMetrics:
        """One optimiser step on the rows [B, D] (any B of at least 1, any floating dtype).

        Raises:
            TrainingError: rows of another width, or none.
        """
        if x_BD.dim() != 2 or x_BD.shape[1] != len(self.centre_D) or not len(x_BD):
            raise TrainingError(f"a batch must be [B, {len(self.centre_D)}] with B >= 1, not {list(x_BD.shape)}")
        weights = self.parameters
        n = len(weights["encoder"])
        lr = learning_rate(
            self.lr,
            self.tokens_trained,
            len(x_BD),
            tokens=self.tokens,
            warmup_tokens=self.warmup_tokens,
            decay_share=self.decay_share,
        )
        rows = self._rows(x_BD)
        pre_BN = torch.addmm(weights["encoder_bias"], rows, weights["encoder"].T)
        values, indices = pre_BN.topk(self.k, dim=1, sorted=False)
        values.relu_()
        residual = ops.weighted_rows(weights["decoder"], indices, values).sub_(rows)
        variance = _variance(rows, rows)
        loss_B = residual.square().sum(1)
        fvu = loss_B.sum() / variance
        g = residual * (2 / variance)
        delta = ops.sampled_products(g, weights["decoder"], indices) * (values > 0)

        pairs = ops.Pairs.of(indices, n)
        a_P, delta_P = values.reshape(-1)[pairs.order], delta.reshape(-1)[pairs.order]
        gradients = {
            "encoder": pairs.latent_rows(rows, delta_P, 0, n),
            "encoder_bias": delta_P.new_zeros(n).index_add_(0, indices.reshape(-1), delta.reshape(-1)),
            "decoder": pairs.latent_rows(g, a_P, 0, n),
        }
        dead_N = self.ages.dead()
        aux = self._auxiliary(rows, residual, pre_BN, dead_N, gradients)
        gradients["pre_bias"] = g.sum(0) - gradients["encoder_bias"] @ weights["encoder"]
        decoder = weights["decoder"]
        along_N = (gradients["decoder"] * decoder).sum(1, keepdim=True)
        gradients["decoder"] -= along_N * decoder
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        loss = fvu + self.aux_coefficient * aux
        finite = torch.isfinite(norm) & torch.isfinite(loss)

        self.steps += 1
        self.tokens_trained += len(x_BD)
        divisor = (norm / self.clip_norm).clamp_min(1.0) if self.clip_norm is not None else torch.ones_like(norm)
        skip = (~finite).float()
        adam = Adam(lr, self.betas, self.eps, torch.tensor(float(self.steps), device=self.device), divisor, skip)
        for name in PARAMETERS:
            adam(weights[name], gradients[name], self.means[name], self.squares[name])
        decoder.mul_(torch.where(finite, 1 / decoder.norm(dim=1, keepdim=True), 1.0))
        fired_N = torch.zeros(n, dtype=torch.bool, device=self.device).index_fill_(0, indices[values > 0], True)
        self.ages.update(fired_N, len(x_BD))
        self._resample(residual, loss_B)
        return StepMetrics(fvu, loss, aux, (values > 0).sum() / len(values), dead_N.sum(), norm, finite, lr)

    def _auxiliary(
        self, rows: Tensor, residual: Tensor, pre_BN: Tensor, dead_N: Tensor, gradients: dict[str, Tensor]
    ) -> Tensor:
        """Add the dead-latent loss's gradients to `gradients`; returns the loss."""
        dead = dead_N.nonzero().squeeze(1)
        if not self.aux_coefficient or not len(dead):
            return torch.zeros((), device=self.device)
        pre_BM = pre_BN[:, dead]
        if self.aux_k < len(dead):
            kept = pre_BM.topk(self.aux_k, dim=1, sorted=False).indices
            mask_BM = torch.zeros_like(pre_BM).scatter_(1, kept, 1.0)
        else:
            mask_BM = torch.ones_like(pre_BM)
        codes_BM = pre_BM * mask_BM
        decoder_MD = self.parameters["decoder"][dead]
        error = torch.addmm(residual, codes_BM, decoder_MD)  # e_hat - e, with e = -residual
        variance = _variance(residual, residual)
        g = error * (2 * self.aux_coefficient / variance)
        delta_BM = (g @ decoder_MD.T) * mask_BM
        gradients["decoder"].index_add_(0, dead, codes_BM.T @ g)
        gradients["encoder"].index_add_(0, dead, delta_BM.T @ rows)
        gradients["encoder_bias"].index_add_(0, dead, delta_BM.sum(0))
        return error.square().sum() / variance

    def _resample(self, residual: Tensor, loss_B: Tensor) -> None:
        """Collect rows, and every `resample_every_steps` steps turn dead latents into their directions."""
        if self.pool is None:
            return
        left = -self.steps % self.resample_every_steps
        if left < POOL_STEPS:
            self.pool.add(-residual, loss_B, self.generator)
        if left:
            return
        dead_N = self.ages.dead()
        dead = self.ages.tokens_N.masked_fill(~dead_N, -1).argsort(descending=True, stable=True)[: int(dead_N.sum())]
        directions = self.pool.draw(len(dead), self.generator)
        dead = dead[: len(directions)]
        self.pool.clear()
        alive_norm = self.parameters["encoder"][~dead_N].norm(dim=1).mean().nan_to_num(1.0)
        self.parameters["decoder"][dead] = directions
        self.parameters["encoder"][dead] = directions * (0.2 * alive_norm)
        self.parameters["encoder_bias"][dead] = 0.0
        for name in ("encoder", "encoder_bias", "decoder"):
            self.means[name][dead] = 0.0
            self.squares[name][dead] = 0.0
        self.ages.tokens_N[dead] = 0

    def sae(self) -> TopKSAE:
        """A copy of the SAE as it stands, on the trainer's device: unit-norm decoder columns, normalisation folded in.

        With x' = (x - centre) / rms, latents scale by rms: W_enc stays, encoder.bias and pre_bias are in x's own units.
        """
        weights = self.parameters
        sae = TopKSAE(len(self.centre_D), len(weights["encoder"]), self.k, seed=0).to(self.device)
        sae.config = dict(self.config)
        with torch.no_grad():
            sae.encoder.weight.copy_(weights["encoder"])
            sae.encoder.bias.copy_(weights["encoder_bias"] * self.rms)
            sae.decoder.weight.copy_(torch.nn.functional.normalize(weights["decoder"], dim=1).T)
            sae.pre_bias.copy_(self.centre_D + self.rms * weights["pre_bias"])
        return sae

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the next step depends on, flat, ready for safetensors (the trainer's own tensors, not copies)."""
        counters = [self.steps, self.tokens_trained, PRECISIONS.index(self.precision)]
        state = {
            "counters": torch.tensor(counters),
            "generator": self.generator.get_state(),
            "ages": self.ages.tokens_N,
            "centre": self.centre_D,
            "rms": self.rms,
        }
        for name in PARAMETERS:
            state[name] = self.parameters[name]
            state[f"{name}.mean"] = self.means[name]
            state[f"{name}.square"] = self.squares[name]
        if self.pool is not None:
            state["pool.rows"] = self.pool.rows_PD
            state["pool.loss"] = self.pool.loss_P
            state["pool.cursor"] = torch.tensor(self.pool.cursor)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`: the next steps are bit-identical to those of the trainer that gave it.

        Raises:
            CheckpointError: a tensor is missing, unknown, or has another shape or dtype; nothing is loaded then.
        """
        own = self.state_dict()
        for name in own.keys() | state.keys():
            if name not in state or name not in own:
                raise CheckpointError(f"trainer state and trainer differ: only one of them has {name!r}")
            if own[name].shape != state[name].shape or own[name].dtype != state[name].dtype:
                raise CheckpointError(
                    f"trainer state {name!r} is {state[name].dtype} {list(state[name].shape)}, "
                    f"the trainer needs {own[name].dtype} {list(own[name].shape)}"
                )
        self.steps, self.tokens_trained, precision = (int(value) for value in state["counters"])
        self.precision = PRECISIONS[precision]
        self.generator.set_state(state["generator"].cpu())
        if self.pool is not None:
            self.pool.cursor = int(state["pool.cursor"])
        for name in own.keys() - {"counters", "generator", "pool.cursor"}:
            own[name].copy_(state[name])


def _variance(x_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Sum of squared deviations from the batch mean, at least 1e-6 of `scale`'s sum of squares (less is rounding)."""
    deviation = (x_BD - x_BD.mean(0)).square().sum()
    floor = 1e-6 * scale_BD.square().sum()
    return torch.maximum(deviation, floor).clamp_min(torch.finfo(torch.float32).tiny)
