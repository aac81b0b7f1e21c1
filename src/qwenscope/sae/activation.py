"""Which pre-activations survive: one class for each kind of SAE, found by its name in `ACTIVATIONS`.

A new kind is a class and its line in the registry: trainer, `config.json`, formats, evaluation and index ask it.

Legend: B rows (tokens), N latents, K places of a row's codes, C candidates of a row (its largest pre-activations).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from qwenscope.errors import FormatError
from qwenscope.sae.selection import top_k

Largest = Callable[[Tensor, int], Tensor]
"""(values [R, C], k) -> bool [R, C]: which are among the k largest of their row, over all latents of the SAE."""


class Activation(ABC):
    """What an SAE does with its pre-activations.

    Args:
        k: active latents per row: exactly, on average or at most, as the kind has it.
    """

    name: ClassVar[str]
    """In `config.json`, recipes and messages."""
    has_threshold: ClassVar[bool] = False
    """Whether `weights.safetensors` holds a `threshold` for each latent."""
    trainable: ClassVar[bool] = False
    """Whether `SAETrainer` may train it: then it has a `keep`."""
    by_batch: ClassVar[bool] = False
    """Whether rows of a training batch share their active latents: some have more of them than others."""

    def __init__(self, k: int) -> None:
        self.k = k

    @abstractmethod
    def select(self, pre_BN: Tensor, threshold_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """The active latents of a trained SAE -> (values [B, K] of at least 0, indices [B, K] int64)."""

    @property
    def candidates(self) -> int:
        """C, of how many of its largest pre-activations a row in training is asked."""
        return self.k

    def keep(self, values_BC: Tensor, largest: Largest) -> Tensor:
        """Candidates' values after ReLU -> those of the latents active in training, 0 for the others [B, C].

        Only kinds that are `trainable` have it.
        """
        raise TypeError(f"{self.name} is not trained")


class TopK(Activation):
    """The k largest pre-activations of each row, after ReLU (Gao et al. 2024, eq. 2)."""

    name = "topk"
    trainable = True

    def select(self, pre_BN: Tensor, threshold_N: Tensor | None) -> tuple[Tensor, Tensor]:
        values_BK, indices_BK = top_k(pre_BN, self.k)
        return values_BK.relu(), indices_BK

    def keep(self, values_BC: Tensor, largest: Largest) -> Tensor:
        return values_BC * largest(values_BC, self.k)


class JumpReLU(Activation):
    """What is above each latent's threshold, and above 0 (Rajamanoharan et al. 2024)."""

    name = "jumprelu"
    has_threshold = True

    def select(self, pre_BN: Tensor, threshold_N: Tensor | None) -> tuple[Tensor, Tensor]:
        assert threshold_N is not None
        return positive(pre_BN.masked_fill(pre_BN <= threshold_N, 0.0))


class BatchTopK(JumpReLU):
    """In training the k * B largest values of the batch; afterwards what is above one threshold, the running mean of
    the smallest value kept (Bussmann et al. 2024, "BatchTopK sparse autoencoders", section 3).
    """

    name = "batch_topk"
    trainable = True
    by_batch = True

    @property
    def candidates(self) -> int:
        return 4 * self.k

    def keep(self, values_BC: Tensor, largest: Largest) -> Tensor:
        kept = largest(values_BC.reshape(1, -1), self.k * len(values_BC))
        return values_BC * kept.view_as(values_BC)


class ReLU(Activation):
    """Whatever is above 0."""

    name = "relu"

    def select(self, pre_BN: Tensor, threshold_N: Tensor | None) -> tuple[Tensor, Tensor]:
        return positive(pre_BN)


def positive(pre_BN: Tensor) -> tuple[Tensor, Tensor]:
    """The entries above 0 -> (values [B, K], indices [B, K]); K is the most that a row has, the rest is filled by 0.

    Finding K waits for the device.
    """
    pre_BN = pre_BN.relu()
    most = int((pre_BN > 0).sum(1).max()) if len(pre_BN) else 0
    return top_k(pre_BN, max(most, 1))


ACTIVATIONS: dict[str, type[Activation]] = {kind.name: kind for kind in (TopK, BatchTopK, JumpReLU, ReLU)}


def activation_of(name: str, k: int) -> Activation:
    """The activation called `name`.

    Raises:
        FormatError: there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise FormatError(f"activation {name!r} is unknown; this version has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name](k)


def described(name: str) -> dict[str, str]:
    """The key `activation` of a configuration or a report: absent for top-k."""
    return {} if name == TopK.name else {"activation": name}


def trained() -> list[str]:
    """Names of the kinds that `SAETrainer` may train."""
    return [name for name, kind in ACTIVATIONS.items() if kind.trainable]


def k_largest(values_RC: Tensor, k: int) -> Tensor:
    """`Largest` where all latents are here."""
    left_out = values_RC.topk(max(0, values_RC.shape[1] - k), dim=1, largest=False, sorted=False).indices
    return torch.ones_like(values_RC, dtype=torch.bool).scatter_(1, left_out, False)
