"""Which latents are active in a batch in training: candidates by the selector, those that stay by the activation.

Legend: B rows (tokens), C candidates of a row, N latents, M dead latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qwenscope.errors import TrainingError
from qwenscope.sae import ops
from qwenscope.sae.activation import Activation, k_largest, trained
from qwenscope.sae.selection import Precision, Selection, Selector
from qwenscope.training.weights import Weights

THRESHOLD_RATE = 0.05
"""Weight of a step in the running mean of the smallest active value; the first 20 steps weigh alike. A slower mean
(0.01) lags behind an encoder that still grows: after 256 steps on real rows it left an eighth of the active latents
out."""


class ActiveLatents:
    """Selects a batch's active latents, and follows the threshold of activations that have one.

    Args:
        activation: of the whole SAE.
        weights: its latents, or this process' of them.
        precision: of the selection.

    Raises:
        TrainingError: the activation is for inference alone.
    """

    def __init__(self, activation: Activation, weights: Weights, precision: Precision) -> None:
        if not activation.trainable:
            raise TrainingError(f"SAETrainer trains {', '.join(trained())}, not an SAE with {activation.name}")
        self.activation, self.weights = activation, weights
        self.selector = Selector(min(activation.candidates, weights.latents), precision)
        self.threshold = torch.zeros_like(weights["pre_bias"][0])
        """0-dim: the running mean of each batch's smallest active value, of normalised rows; 0 without a threshold."""

    def select(self, rows: ops.Panels, names: Tensor | None) -> Selection:
        """The active latents of a batch, by the precision's products; `names` as of the selector."""
        weights = self.weights

        def candidates(width: int) -> Selection:
            selector = self.selector if width == self.selector.k else Selector(width, self.selector.precision)
            return selector(rows, weights["encoder"], weights.encoder, weights["encoder_bias"], names)

        return self.among(candidates)

    def of(self, pre_BN: Tensor) -> Selection:
        """The active latents of a batch whose pre-activations are all known."""

        def candidates(width: int) -> Selection:
            values_BC, indices_BC = pre_BN.topk(width, dim=1, sorted=False)
            return Selection(values_BC.relu(), indices_BC, None, 0)

        return self.among(candidates)

    def among(self, candidates: Callable[[int], Selection]) -> Selection:
        """The active ones among a batch's candidates, of which those that are not active get the value 0.

        Where rows share them, one whose candidates are all active may have more: on a CPU the batch is then selected
        again among twice as many. A GPU would have to be waited for; there such a row keeps its candidates.

        Args:
            candidates: that many of each row's largest pre-activations, after ReLU.
        """
        width = self.selector.k
        while True:
            selection = candidates(width)
            values = self._kept(selection.values)
            if not self.activation.by_batch or values.is_cuda or not self._exhausted(values):
                return replace(selection, values=values)
            width = min(2 * width, self.weights.latents)

    def _kept(self, values_BC: Tensor) -> Tensor:
        """Candidates' values, 0 for those that are not active."""
        if not self.activation.by_batch and values_BC.shape[1] <= self.activation.k:
            return values_BC
        return self.activation.keep(values_BC, self.largest)

    def largest(self, values_RC: Tensor, k: int) -> Tensor:
        """Which values are among the k largest of their row, over all latents of the SAE -> bool [R, C]."""
        return k_largest(values_RC, k)

    def follow(self, values_BC: Tensor, step: Tensor, finite: Tensor) -> None:
        """Take a batch's smallest active value into the threshold, unless the step (0-dim, from 1) was not finite."""
        if self.activation.has_threshold:
            smallest = self._smallest(values_BC)
            rate = (1 / step.to(smallest)).clamp_min(THRESHOLD_RATE)
            moved = self.threshold + rate * (smallest - self.threshold)
            self.threshold.copy_(torch.where(finite & smallest.isfinite(), moved, self.threshold))

    def _exhausted(self, values_BC: Tensor) -> bool:
        """Whether all candidates of some row are active, and there are more latents than candidates."""
        return values_BC.shape[1] < self.weights.latents and bool((values_BC > 0).all(1).any())

    def _smallest(self, values_BC: Tensor) -> Tensor:
        """The smallest active value, over all latents of the SAE; infinity if none is."""
        return values_BC.masked_fill(values_BC <= 0, torch.inf).min()
