"""Feature absorption (Chanin et al. 2024, arXiv 2409.14507): a latent for a label that stays silent on some tokens
that have it, since a latent of those tokens alone carries the label's direction as well. The measure is SAEBench's
(Karvonen et al. 2025, arXiv 2503.09532) "full absorption"; docs/evaluation.md defines it and says what differs.

Legend: as in probing.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score
from torch import Tensor

from qwenscope.evaluation.baselines import directions
from qwenscope.evaluation.probing import Array, Draws, Floats, Mask, Probe, Task
from qwenscope.sae.sae import SAE

MOST_MAIN = 10
"""Main latents of a label, at most."""
F1_STEP = 0.03
"""What one more main latent has to add to the F1 of the label."""
ALIGNED, CARRIED = 0.025, 0.4
"""An absorbing latent's cosine with the probe's direction, and its part of the row's projection, at least."""


@dataclass(frozen=True)
class Direction:
    """The probe of one label on all dimensions of the rows: its unit direction, and its score of every row."""

    task: Task
    unit_D: Array
    score_R: Array


def label_directions(x_RD: Tensor, tasks: Sequence[Task]) -> list[Direction]:
    """Logistic regression of each label on all dimensions of the rows."""
    rows_RD = x_RD.cpu().numpy()
    found = []
    for task in tasks:
        probe = Probe.of(rows_RD, task)
        everything = np.arange(rows_RD.shape[1])
        learner = probe.regression(everything)
        weight_D = learner.coef_[0] / np.maximum(probe.spread_F, 1e-9)
        score_R = learner.decision_function(probe.scaled(everything))
        found.append(Direction(task, weight_D / max(np.linalg.norm(weight_D), 1e-30), score_R))
    return found


def main_latents(codes_RN: Floats, task: Task) -> NDArray[np.int64]:
    """The label's latents by k-sparse probing: the one whose mean is furthest above, in standard deviations, and the
    next ones as long as each adds F1_STEP to the F1 of a logistic regression on the rows learnt from."""
    probe = Probe.of(codes_RN, task)
    order = np.argsort(-probe.effect_F, kind="stable")
    order = order[probe.effect_F[order] > 0][:MOST_MAIN]
    label_R, best, kept = task.positive_R[task.train_R], -np.inf, 0
    for count in range(1, len(order) + 1):
        guess_R = probe.regression(order[:count]).predict(probe.scaled(order[:count])[task.train_R])
        f1 = f1_score(label_R, guess_R)
        if f1 <= best + F1_STEP:
            break
        best, kept = f1, count
    return order[:kept]


class Counts:
    """How many of the rows looked at are such, by family and conversation, over the labels of a family."""

    def __init__(self, conversation_R: NDArray[np.int64]) -> None:
        self.conversation_R, self.conversations = conversation_R, int(conversation_R.max()) + 1
        self.sums: dict[str, tuple[Array, Array]] = {}

    def add(self, family: str, such_R: Mask, of_R: Mask) -> None:
        """Of the rows `of_R`, those in `such_R`."""
        hits_C, of_C = self.sums.setdefault(family, (np.zeros(self.conversations), np.zeros(self.conversations)))
        hits_C += np.bincount(self.conversation_R[such_R & of_R], minlength=self.conversations)
        of_C += np.bincount(self.conversation_R[of_R], minlength=self.conversations)

    def shares(self, weight_SC: Array) -> Draws:
        """{family: share of the rows looked at under each draw of conversations, [S]}; families without one are out."""
        with np.errstate(invalid="ignore"):
            return {
                family: (weight_SC @ hits_C) / (weight_SC @ of_C)
                for family, (hits_C, of_C) in self.sums.items()
                if of_C.any()
            }


def absorption(
    sae: SAE, codes_RN: Floats, x_RD: Tensor, labels: Sequence[Direction], conversation_R: NDArray[np.int64], seed: int
) -> dict[str, Counts]:
    """Where each label's main latents are silent, and where another latent carries the label instead.

    Args:
        sae: reads and reconstructs the same rows.
        codes_RN: its latents of the rows.
        x_RD: the rows.
        labels: of `label_directions`.
        conversation_R: of the rows, from 0.
        seed: of the random directions.

    Returns:
        `absorbed`; `silent`: the main latents are, whoever carries the label; `random directions`: absorbed, with a
        random direction in the place of the probe's. Looked at are held-out rows with the label that the probe finds.
    """
    decoder_ND, bias_D = sae.decoder.weight.detach().T.float().cpu().numpy(), sae.pre_bias.detach().cpu().numpy()
    centred_RD = x_RD.cpu().numpy() - bias_D
    random_MD = directions(sae, seed).numpy().astype(np.float64)
    found = {name: Counts(conversation_R) for name in ("absorbed", "silent", "random directions")}
    for number, label in enumerate(labels):
        silent_R: Mask = np.count_nonzero(codes_RN[:, main_latents(codes_RN, label.task)] > 0, axis=1) == 0
        looked_R = label.task.held_R & label.task.positive_R & (label.score_R > 0)
        for name, unit_D in (("absorbed", label.unit_D), ("random directions", random_MD[number % len(random_MD)])):
            projection_R = centred_RD @ unit_D
            there_R = looked_R & (projection_R > 0)
            absorbed_R = there_R & silent_R
            absorbed_R[absorbed_R] = _carried(codes_RN[absorbed_R], decoder_ND, projection_R[absorbed_R], unit_D)
            found[name].add(label.task.family, absorbed_R, there_R)
            if name == "absorbed":
                found["silent"].add(label.task.family, silent_R, there_R)
    return found


def _carried(codes_RN: Floats, decoder_ND: Floats, projection_R: Array, unit_D: Array) -> Mask:
    """Whether one latent, aligned with the direction, holds CARRIED of each row's projection on it."""
    if not len(codes_RN):
        return np.zeros(0, dtype=bool)
    along_N = decoder_ND @ unit_D
    cosine_N = along_N / np.maximum(np.linalg.norm(decoder_ND, axis=1), 1e-9)
    part_RN = codes_RN * along_N
    carried: Mask = (cosine_N[part_RN.argmax(1)] >= ALIGNED) & (part_RN.max(1) >= CARRIED * projection_R)
    return carried
