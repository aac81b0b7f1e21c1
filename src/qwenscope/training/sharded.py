"""Train an SAE whose latents are spread over several ranks: `SAETrainer` with sums over all ranks' latents.

Every rank makes the same calls with the same rows. What travels is listed in `parallel/shard.py`.

Legend: B rows (tokens), D hidden, N latents of the whole SAE, K active latents, M dead latents of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from qwenscope.parallel.shard import Shard
from qwenscope.sae import ops
from qwenscope.sae.activation import Activation, activation_of
from qwenscope.sae.sae import SAE
from qwenscope.sae.selection import Precision, Selection, best_precision
from qwenscope.training.active import ActiveLatents
from qwenscope.training.gradients import Downstream
from qwenscope.training.metrics import StepMetrics
from qwenscope.training.trainer import SAETrainer
from qwenscope.training.weights import Weights


class ShardedWeights(Weights):
    """This rank's latents of an SAE; sums over latents are over those of all ranks, the same bits on each."""

    def __init__(self, sae: SAE, shard: Shard, precision: Precision, moments: torch.dtype | None) -> None:
        self.shard = shard
        super().__init__(sae, precision, moments)

    @property
    def first(self) -> int:
        return self.shard.start

    def _eight_bits_pay(self) -> bool:
        return self.shard.group.broadcast_object(super()._eight_bits_pay)

    def decode(self, indices_BK: Tensor, values_BK: Tensor) -> ops.Panels:
        own = super().decode(indices_BK, values_BK)
        return ops.Panels(tuple(self.shard.all_reduce(part) for part in own.parts))

    def errors(self, selection: Selection, rows: ops.Panels) -> tuple[ops.Panels, Tensor]:
        errors = self.decode(selection.indices, selection.values).sub_(rows)
        return errors, errors.squares()

    def decode_exactly(self, indices_BK: Tensor, values_BK: Tensor) -> Tensor:
        return self.shard.all_reduce(super().decode_exactly(indices_BK, values_BK))

    def decode_dense(self, codes_BM: Tensor, decoder_MD: Tensor) -> Tensor:
        return self.shard.all_reduce(super().decode_dense(codes_BM, decoder_MD))

    def through_encoder(self, bias_N: Tensor) -> Tensor:
        return self.shard.all_reduce(super().through_encoder(bias_N))

    def bound(self, of_latents: Tensor) -> Tensor:
        return self.shard.all_reduce(of_latents)

    def norm(self, encoder_bias: Tensor, pre_bias: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """As of one process: the ranks have pre_bias alike, so that it counts on the first alone."""
        once = pre_bias if self.shard.group.leads else torch.zeros_like(pre_bias)
        of_ranks = self.shard.group.all_gather(super().norm(encoder_bias, once, rows))
        whole: Tensor = torch.stack(of_ranks).norm()
        return whole


class ShardedActiveLatents(ActiveLatents):
    """Those among this rank's latents that are active in the whole SAE."""

    def __init__(self, activation: Activation, weights: Weights, precision: Precision, shard: Shard) -> None:
        self.shard = shard
        super().__init__(activation, weights, precision)

    def _kept(self, values_BC: Tensor) -> Tensor:
        return self.activation.keep(values_BC, self.largest)

    def largest(self, values_RC: Tensor, k: int) -> Tensor:
        if values_RC.shape[1] <= k:
            return self.shard.largest(values_RC, k)
        values, places = values_RC.topk(k, dim=1, sorted=False)
        return torch.zeros_like(values_RC, dtype=torch.bool).scatter_(1, places, self.shard.largest(values, k))

    def _exhausted(self, values_BC: Tensor) -> bool:
        return int(self.shard.all_reduce(torch.tensor(int(super()._exhausted(values_BC))))) > 0

    def _smallest(self, values_BC: Tensor) -> Tensor:
        return torch.stack(self.shard.group.all_gather(super()._smallest(values_BC))).min()


class ShardedTrainer(SAETrainer):
    """As `SAETrainer`, for this rank's latents of an SAE; its arguments are the same on all ranks.

    Args:
        sae: this rank's latents, as an SAE of their own.
        lr: peak learning rate.
        shard: which latents they are.
        precision, options: as of `SAETrainer`.

    Raises:
        TrainingError: an impossible value.
    """

    def __init__(
        self, sae: SAE, lr: float, *, shard: Shard, precision: Precision | Literal["auto"] = "auto", **options: Any
    ) -> None:
        self.shard = shard
        measured = precision == "auto"
        if precision == "auto":
            precision = shard.group.broadcast_object(lambda: best_precision(sae.encoder.weight))
        super().__init__(sae, lr, precision=precision, **options)
        self._precision_is_free = measured
        self.config = sae.config | {"dict_size": shard.dict_size, "k": shard.k}
        if self.pool is not None:
            self.pool = self._new_pool(shard.dict_size)

    def _active(self, sae: SAE) -> ActiveLatents:
        activation = activation_of(sae.activation.name, self.shard.k)
        return ShardedActiveLatents(activation, self.weights, self.precision, self.shard)

    def _take(self, sae: SAE, moments: torch.dtype | None) -> Weights:
        return ShardedWeights(sae, self.shard, self.precision, moments)

    @property
    def capturable(self) -> bool:
        return False  # ranks talk to each other in it

    def step(self, x_BD: Tensor, downstream: Downstream | None = None) -> StepMetrics:
        own = super().step(x_BD, downstream)
        active = self.shard.all_reduce((own.l0 * len(x_BD)).round())  # whole numbers add up exactly
        return replace(own, l0=active / len(x_BD), dead=self.shard.all_reduce(own.dead))

    def _share_redone(self, selection: Selection) -> float:
        everywhere = self.shard.all_reduce(torch.tensor(selection.redone))
        return float(everywhere) / (len(selection.values) * self.shard.group.size)

    def _any_dead(self, names: Tensor) -> bool:
        return int(self.shard.all_reduce(torch.tensor(len(names)))) > 0

    def _of_all(self, values_N: Tensor) -> Tensor:
        return self.shard.all_gather(values_N)

    def _restart(self, latents: Tensor, directions_LD: Tensor, encoder_norm: Tensor) -> None:
        """Those among them that are this rank's."""
        own = (latents >= self.shard.start) & (latents < self.shard.stop)
        super()._restart(latents[own] - self.shard.start, directions_LD[own], encoder_norm)

    def collect(self) -> SAE | None:
        """The SAE on the first rank, on the CPU, by way of the host's memory; None on the others."""
        whole = {name: self.shard.gather(rows) for name, rows in self._by_latent()}
        if not self.shard.group.leads:
            return None
        whole["decoder.weight"] = whole["decoder.weight"].T
        return SAE.of(self.config, {**whole, "pre_bias": self._pre_bias().cpu()})
