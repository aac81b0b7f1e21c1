"""Train one SAE: `SAETrainer.step` is one optimizer step on plain tensors, without autograd.

Loss (Gao et al. 2024, eq. 3 and section A.2, with a batch-relative reconstruction term):

    FVU = sum ||x - x_hat||^2 / sum ||x - mean_batch(x)||^2            aux = ||e - e_hat||^2 / ||e - mean(e)||^2
    loss = FVU + aux_coefficient * aux, where e = x - x_hat (held fixed) and e_hat decodes the aux_k largest
    pre-activations, without ReLU, among the latents that are dead.

Legend: B rows (tokens), D hidden, N latents, K active latents per row, M dead latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qwenscope.errors import TrainingError
from qwenscope.sae import ops
from qwenscope.sae.rows import Rows, as_rows
from qwenscope.sae.sae import SAE
from qwenscope.sae.selection import PRECISIONS, Precision, Selection, Selector, best_precision
from qwenscope.seeds import generator
from qwenscope.training import trainer_state
from qwenscope.training.active import ActiveLatents
from qwenscope.training.card_rows import CardRows
from qwenscope.training.dead_latents import FiringAges, ResamplingPool, longest_dead
from qwenscope.training.fit import Fit, OnStep, fit
from qwenscope.training.gradients import DOWNSTREAM_SIZE, Auxiliary, Downstream, SparseGradient, variance
from qwenscope.training.guards import check_arguments, check_rows
from qwenscope.training.initial import InitialDecoder, point_at_residuals, point_at_rows, tie_encoder
from qwenscope.training.metrics import StepMetrics
from qwenscope.training.nested import Nested
from qwenscope.training.optimizer import Adam, update
from qwenscope.training.schedule import learning_rate
from qwenscope.training.weights import Weights, master_dtype

REDONE_SHARE = 1 / 8
"""Rows without certificate above which 8-bit candidates cost more than they save, and are given up for good."""
POOL_STEPS = 100
"""Steps before a resampling whose rows may become directions."""


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
        initial_decoder: "random", as `sae` comes, or what `calibrate` points latents at, "rows" or "residuals".
        precision: "fp32", "bf16", "exact" (candidates by fewer bits, float32 values and gradients) or "auto".
        betas, eps, cautious: Adam's; a cautious step leaves out what the batch's own gradient contradicts.
        clip_norm: largest gradient norm over all parameters; None switches clipping off.
        moments: dtype of Adam's moments: None, that of the weights, or bfloat16, the second one rounded stochastically.
        seed: of the resampling, and of the rows that latents are pointed at.
        prefixes: latents at which nested dictionaries end whose losses are added (Matryoshka); see `nested`.

    Raises:
        TrainingError: an impossible value.
    """

    def __init__(
        self,
        sae: SAE,
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
        initial_decoder: InitialDecoder = "random",
        precision: Precision | Literal["auto"] = "auto",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 6.25e-10,
        cautious: bool = False,
        clip_norm: float | None = 1.0,
        moments: torch.dtype | None = None,
        seed: int = 0,
        prefixes: Sequence[int] = (),
    ) -> None:
        check_arguments(
            lr=lr >= 0,
            tokens=tokens is None or tokens > 0,
            warmup_tokens=warmup_tokens >= 0,
            decay_share=0 <= decay_share <= 1,
            aux_coefficient=aux_coefficient >= 0,
            aux_k=aux_k is None or aux_k > 0,
            dead_after_tokens=dead_after_tokens is None or dead_after_tokens > 0,
            resample_every_steps=resample_every_steps >= 0,
            precision=precision in ("auto", *PRECISIONS),
            initial_decoder=initial_decoder in get_args(InitialDecoder),
            clip_norm=clip_norm is None or clip_norm > 0,
            moments=moments in (None, master_dtype(sae), torch.bfloat16),
        )
        self.device, self.seed, self.initial_decoder = sae.pre_bias.device, seed, initial_decoder
        self.nested = Nested(prefixes, sae.dict_size, self.device)
        self.config = sae.config | self.nested.described()
        self.lr, self.tokens, self.warmup_tokens, self.decay_share = lr, tokens, warmup_tokens, decay_share
        self.aux_coefficient, self.resample_every_steps = aux_coefficient, resample_every_steps
        self.aux_k = max(1, sae.hidden_dim // 2) if aux_k is None else aux_k
        self.betas, self.eps, self.cautious, self.clip_norm, self.normalise = betas, eps, cautious, clip_norm, normalise
        self._precision_is_free = precision == "auto"
        self.precision: Precision = best_precision(sae.encoder.weight) if precision == "auto" else precision
        self.weights = self._take(sae, moments)
        self.active = self._active(sae)
        self.centre_D = torch.zeros_like(self.weights["pre_bias"])
        self.rms = torch.ones_like(self.centre_D[0])
        dead_after = dead_after_tokens or (1_000_000 if tokens is None else max(1, tokens // 50))
        self.ages = FiringAges(sae.dict_size, dead_after, self.device)
        self.pool = self._new_pool(sae.dict_size) if resample_every_steps else None
        self.generator = generator(seed, "resampling")
        # Listing the dead synchronises with a GPU, so there they are listed every so many steps.
        self._refresh_every = 64 if self.device.type == "cuda" else 1
        self.candidates_N = torch.zeros(sae.dict_size, dtype=torch.bool, device=self.device)
        self._names: Tensor | None = None  # latents that the dead-latent loss works with
        self._lr, self._step = torch.zeros_like(self.rms), torch.zeros_like(self.rms, dtype=torch.float32)
        self._zero, self._listed, self.steps, self.tokens_trained = torch.zeros_like(self.rms), False, 0, 0

    def _take(self, sae: SAE, moments: torch.dtype | None) -> Weights:
        """Copies of the SAE's tensors, ready for training."""
        return Weights(sae, self.precision, moments)

    def _active(self, sae: SAE) -> ActiveLatents:
        """What selects the active latents."""
        return ActiveLatents(sae.activation, self.weights, self.precision)

    def _new_pool(self, dict_size: int) -> ResamplingPool:
        """An empty pool that offers a direction for every fourth latent."""
        steps = min(POOL_STEPS, self.resample_every_steps)
        per_step = max(1, dict_size // (4 * steps))
        return ResamplingPool(per_step * steps, len(self.centre_D), per_step, self.device)

    def calibrate(self, rows_RD: Tensor) -> None:
        """Fit what does not need training, on a run's first rows: centre, scale, directions, the encoder's length.

        pre_bias becomes the rows' mean; with `normalise`, rows are from now on centred by that mean and divided by
        their rms deviation per element, and pre_bias starts at 0. If `initial_decoder` says so, latents point at rows,
        or at what earlier latents leave of them.
        The encoder becomes the decoder, scaled to fit these rows best (`tie_encoder`). Rows without spread leave both
        scales at 1.

        Raises:
            TrainingError: rows that are not finite, or whose squares are not in the weights' dtype.
        """
        check_rows(rows_RD, len(self.centre_D))
        dtype, chunks = self.centre_D.dtype, torch.split(rows_RD, 1024)
        mean_D = rows_RD.mean(0, dtype=torch.float64).to(self.device, dtype)
        deviation = torch.stack([(chunk.to(mean_D) - mean_D).square().sum() for chunk in chunks]).sum()
        if not torch.isfinite(deviation):
            raise TrainingError("calibration rows are not finite, or too large to be squared; look for broken rows")
        if self.normalise:
            self.centre_D = mean_D
            self.rms = torch.where(deviation > 0, (deviation / rows_RD.numel()).sqrt(), 1.0)
        else:
            self.weights["pre_bias"].copy_(mean_D)
        if self.initial_decoder != "random":
            point = point_at_rows if self.initial_decoder == "rows" else point_at_residuals
            point(self.weights, rows_RD, mean_D, generator(self.seed, "initial decoder"))
        tie_encoder(self.weights, self.active, (self._plain_rows(chunk)[:] for chunk in chunks))

    def _rows(self, x_BD: Tensor) -> ops.Panels:
        """What the encoder multiplies: normalised rows less pre_bias."""
        if ops.fused(self.centre_D):
            offset_D = torch.addcmul(self.centre_D, self.rms, self.weights["pre_bias"])
            x_BD, k = x_BD.to(self.device).contiguous(), self.active.activation.k
            return CardRows.made(x_BD, offset_D, self.rms, self.weights.decoder, k)
        return self._plain_rows(x_BD)

    def _plain_rows(self, x_BD: Tensor) -> ops.Panels:
        """The same by plain torch, in the weights' dtype."""
        parts = []
        matrices = (x_BD.to(self.device), self.centre_D, self.weights["pre_bias"])
        for part, centre, bias in zip(*map(ops.cut, matrices), strict=True):
            x = part.to(centre.dtype)
            x = (x - centre).div_(self.rms).sub_(bias) if self.normalise else x - bias
            parts.append(x.contiguous())
        return ops.Panels(tuple(parts))

    def fit(
        self,
        rows: Any,
        *,
        batch_size: int = 4096,
        held_out: Rows | None = None,
        on_step: OnStep | None = None,
        checkpoint: Path | str | None = None,
        checkpoint_every: int = 1000,
        seed: int = 0,
        progress: bool = False,
    ) -> Fit:
        """Train on `rows` once, in a shuffled order, calibrated on some of them first.

        Rates decay over the trainer's `tokens`: give it the number of rows.

        Args:
            rows: [R, D] of any floating dtype, a tensor, array or memmap; a folder of .safetensors files with one such
                matrix each; or an iterable of batches (a DataLoader), whose order is then its own.
            batch_size: rows per step; the last batch also takes those that are left over.
            held_out: rows [R, D] (not an iterable) to measure on at the end.
            on_step: called with (step number, StepMetrics) after every step; returning True stops.
            checkpoint: a file written every `checkpoint_every` steps and at the end. Where it exists, training
                goes on from it, to the same bits; an iterable must then give the same batches again.
            seed: of the order.
            progress: show a bar.

        Raises:
            TrainingError: rows that cannot be trained on. CheckpointError: a checkpoint of other rows or settings.
        """
        path = None if checkpoint is None else Path(checkpoint)
        return fit(self, rows, batch_size, held_out, on_step, path, checkpoint_every, seed, progress)

    @torch.no_grad()
    def step(self, x_BD: Rows, downstream: Downstream | None = None) -> StepMetrics:
        """One optimizer step on the rows [B, D] (any B of at least 1, any floating dtype; an array is taken as well).

        The loss of `downstream`, scaled to DOWNSTREAM_SIZE of the error's, is trained with it.

        Raises:
            TrainingError: rows of another width, or none.
        """
        x_BD = check_rows(as_rows(x_BD), len(self.centre_D))
        return self.after(self.before(len(x_BD)), *self.device_step(x_BD, downstream))

    def before(self, rows: int) -> float:
        """What the host does before a step on so many rows -> the step's learning rate."""
        lr = learning_rate(
            self.lr,
            self.tokens_trained,
            rows,
            tokens=self.tokens,
            warmup_tokens=self.warmup_tokens,
            decay_share=self.decay_share,
        )
        if self.steps % self._refresh_every == 0:
            self.candidates_N.copy_(self.ages.dead())
            self._listed = False
        if not self._listed:
            self._list_dead()
        self.steps += 1
        self.tokens_trained += rows
        self._lr.fill_(lr)
        self._step.fill_(self.steps)
        return lr

    @torch.no_grad()
    def after(self, lr: float, metrics: dict[str, Tensor], g: ops.Panels | None, loss_B: Tensor) -> StepMetrics:
        """What the host does after a step, given what `device_step` returned."""
        if self.pool is not None and g is not None:
            if -self.steps % self.resample_every_steps < POOL_STEPS:
                self.pool.add(g, loss_B, self.generator)
            if self.steps % self.resample_every_steps == 0:
                self._resample(self.pool)
        return StepMetrics(lr=lr, **metrics)

    def device_step(
        self, x_BD: Tensor, downstream: Downstream | None = None
    ) -> tuple[dict[str, Tensor], ops.Panels | None, Tensor]:
        """The part of a step that runs on the device: no host decision depends on a value, shapes are static.

        On CUDA in bf16 it can be captured as a graph (see `graph`). Returns the metrics (without lr), dLoss/dx_hat if
        there is a pool for it, and the loss of each row.
        """
        weights, names, dead = self.weights, self._names, self.ages.dead().sum()
        rows = self._rows(x_BD)
        selection = self.active.select(rows, names)
        errors, loss_B = self.nested.errors(weights, selection, rows)
        error, whole = self.nested.whole(errors), variance(rows)
        fvu = loss_B.sum() / whole
        auxiliary = None
        if names is not None and selection.named is not None:
            kept_BM = self.active.largest(selection.named, self.aux_k)
            auxiliary = Auxiliary.of(weights, rows, error, selection.named, kept_BM, names, self.aux_coefficient)
        aux_loss = auxiliary.loss if auxiliary else self._zero
        loss, factor = self.nested.loss(errors, fvu, whole), 2 / whole
        further = [of.to(loss) for of in downstream(x_BD.to(loss) + self.rms * error[:])] if downstream else ()
        g = self.nested.gradient(errors, factor)  # dLoss/dx_hat, in the errors' place
        g_norm_S = self.nested.norms(g, loss_B, factor)
        if further:
            scale = torch.where(further[0] > 0, DOWNSTREAM_SIZE * self.rms * loss / further[0], 0.0)
            g_norm_S = self.nested.add(g, scale * further[1])
        if auxiliary:
            loss = loss + self.aux_coefficient * aux_loss
        gradient = SparseGradient.of(weights, rows, g, g_norm_S, selection, auxiliary, self.nested)
        del rows, errors, error, g  # in bf16 the gradient has copies of its own
        finite = gradient.bound + loss < torch.inf
        adam = Adam(self._lr, self.betas, self.eps, self._step, self.cautious)
        norm = update(weights, gradient, adam, self.clip_norm, finite)
        self.ages.update(gradient.fired, len(x_BD), finite)
        self.active.follow(selection.values, self._step, finite)
        if weights.eight_bits and self._share_redone(selection) > REDONE_SHARE and finite:
            weights.shadow(self.precision, eight_bits=False)
        metrics = {
            "fvu": fvu,
            "loss": loss,
            "aux_loss": aux_loss,
            "l0": selection.values.count_nonzero() / len(x_BD),
            "dead": dead,
            "grad_norm": norm,
            "finite": finite,
        } | ({"kl": further[0]} if further else {})
        return metrics, self.nested.whole(gradient.g) if self.pool else None, loss_B

    def _share_redone(self, selection: Selection) -> float:
        """The share of a batch's rows whose candidates had no certificate, so that they were selected again."""
        return selection.redone / len(selection.values)

    @property
    def capturable(self) -> bool:
        """Whether `device_step` is the same work in each step as long as `named` is the same."""
        return self.device.type == "cuda" and self.precision == "bf16"

    @property
    def named(self) -> Tensor | None:
        """Latents [M] that the dead-latent loss works with: the same tensor for as long as they are the same."""
        return self._names

    def _list_dead(self) -> None:
        """Take up `candidates_N`: what the dead-latent loss works with."""
        names = self.candidates_N.nonzero().squeeze(1)
        if not self.aux_coefficient or not self._any_dead(names):
            self._names = None
        elif self._names is None or not torch.equal(names, self._names):  # else it stays the very same tensor
            self._names = names
        self._listed = True

    def _any_dead(self, names: Tensor) -> bool:
        """Whether there is work for the dead-latent loss."""
        return len(names) > 0

    def _resample(self, pool: ResamplingPool) -> None:
        """Turn the longest dead latents into directions from the pool."""
        ages_N = self._of_all(self.ages.tokens_N)
        dead = longest_dead(ages_N, self.ages.dead_after_tokens)
        directions = -pool.draw(len(dead), self.generator)  # the pool has dLoss/dx_hat, a step goes against it
        norms_N = self._of_all(self.weights["encoder"].norm(dim=1))
        alive_norm = norms_N[ages_N < self.ages.dead_after_tokens].mean().nan_to_num(1.0)
        self._restart(dead[: len(directions)], directions, 0.2 * alive_norm)

    def _of_all(self, values_N: Tensor) -> Tensor:
        """A number of each latent of the SAE, by latent."""
        return values_N

    def _restart(self, latents: Tensor, directions_LD: Tensor, encoder_norm: Tensor) -> None:
        """Point these latents of the SAE at the directions, as if just born."""
        self.weights.restart(latents, directions_LD, encoder_norm)
        self.ages.tokens_N[latents] = 0

    def sae(self) -> SAE:
        """A copy of the SAE as it stands, on the trainer's device: unit-norm decoder columns, normalisation folded in.

        With x' = (x - centre) / rms, latents scale by rms: W_enc stays, encoder.bias and pre_bias are in x's own units.
        """
        parts = dict(self._by_latent())
        parts["decoder.weight"] = parts["decoder.weight"].T
        return SAE.of(self.config, {**parts, "pre_bias": self._pre_bias()})

    def collect(self) -> SAE | None:
        """As `sae`; None where another process collects the SAE."""
        return self.sae()

    def _by_latent(self) -> Iterator[tuple[str, Tensor]]:
        """The SAE's tensors with a row for each latent, one after the other, float32."""
        yield "encoder.weight", self.weights["encoder"].to(torch.float32, copy=True)
        yield "encoder.bias", (self.weights["encoder_bias"] * self.rms).float()
        yield "decoder.weight", torch.nn.functional.normalize(self.weights["decoder"], dim=1).float()
        if self.active.activation.has_threshold:
            yield "threshold", (self.active.threshold * self.rms).float().repeat(self.weights.latents)

    def _pre_bias(self) -> Tensor:
        return (self.centre_D + self.rms * self.weights["pre_bias"]).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the next step depends on, flat, ready for safetensors (the trainer's own tensors, not copies)."""
        return trainer_state.tensors(self)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`: the next steps are bit-identical to those of the trainer that gave it.

        Raises:
            CheckpointError: a tensor is missing, unknown, or has another shape or dtype, or another precision was
                asked for; nothing is loaded then.
        """
        precision, eight_bits = trainer_state.restore(self, state, free=self._precision_is_free)
        self.precision, self._listed = precision, False
        self.weights.shadow(precision, eight_bits)
        self.active.selector = Selector(self.active.selector.k, precision)
