"""A monitor's detector: a weighted sum of a few latents, pooled over the tokens that count, and a threshold.

    score(tokens) = bias + sum over its latents of weight * (largest, or mean, activation over the tokens)

is the same formula for one token, a turn, a conversation, and a conversation so far. What a conversation so far scores
is computed token by token in a fixed order, and codes are computed in blocks of BLOCK positions, each row at the place
of its position: the same rows give the same bits, whether they come at once or one after the other.

A monitor on disk is a folder: `monitor.json`, `weights.safetensors`, `SHA256SUMS`.

Legend: T tokens, R rows, D hidden, F latents of the detector, K active latents, C conversations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from qwenscope.analysis.pooling import Scope, scoped_rows
from qwenscope.analysis.statistics import Array
from qwenscope.checksums import verify_folder, write_checksums
from qwenscope.corpus.conversation import ROLES, Conversation
from qwenscope.errors import FormatError
from qwenscope.files import read_object, whole_folder, write_json
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.opening import Target
from qwenscope.recipe import Recipe
from qwenscope.sae.sae import SAE, Codes

BLOCK = 32
"""Positions that are encoded together, whichever of them are there."""
VERSION = 1
_FILE, _WEIGHTS = "monitor.json", "weights.safetensors"
_KEYS = {"version", "model", "revision", "model_digest", "sae", "sae_digest", "site", "pool", "roles", "start", "stop"}


@dataclass(frozen=True)
class Turn:
    """Neighboring tokens of one role."""

    role: str
    start: int
    """Position of its first token in the conversation."""
    score: float


@dataclass(frozen=True)
class Scores:
    """Of one conversation; T tokens that count."""

    score: float
    """Of the whole; of no tokens, the bias."""
    position_T: NDArray[np.int64]
    """Of the tokens that count."""
    token_T: Array
    """Each token by itself."""
    so_far_T: Array
    """All tokens up to this one."""
    turns: list[Turn]


@dataclass(frozen=True)
class Running:
    """What is known after some tokens."""

    pooled_F: Array
    tokens: int

    @staticmethod
    def start(latents: int) -> Running:
        """Before the first token."""
        return Running(np.zeros(latents), 0)


@dataclass(frozen=True)
class Detector:
    """A detector for one SAE of one language model.

    `latents_F` are the latents' numbers, `weight_F` float64; `threshold` belongs to `fpr`; `about` is what
    `monitor.json` says besides.
    """

    latents_F: NDArray[np.int64]
    weight_F: Array
    bias: float
    pool: str
    scope: Scope
    threshold: float
    fpr: float
    about: dict[str, Any]
    controls: dict[str, NDArray[Any]]
    """Weights of what it is compared with: see `monitor.control_scores`."""

    def go_on(self, running: Running, active_TF: Array) -> tuple[Running, Array, Array]:
        """(what is known afterwards, each token's score, the score after each token) of further tokens [T, F]."""
        if not len(active_TF):
            return running, np.zeros(0), np.zeros(0)
        joined_TF = np.concatenate([running.pooled_F[None], active_TF])
        count = running.tokens + len(active_TF)
        if self.pool == "max":
            pooled_TF = kept_TF = np.maximum.accumulate(joined_TF)[1:]
        else:
            kept_TF = np.cumsum(joined_TF, axis=0)[1:]
            pooled_TF = kept_TF / np.arange(running.tokens + 1, count + 1)[:, None]
        return Running(kept_TF[-1].copy(), count), self.weighted(active_TF), self.weighted(pooled_TF)

    def weighted(self, pooled_TF: Array) -> Array:
        """Scores [T] of pooled activations [T, F]."""
        scores: Array = np.cumsum(pooled_TF * self.weight_F, axis=1)[:, -1] + self.bias
        return scores

    def active(self, sae: SAE, x_RD: Tensor, position_R: Tensor, conversation_R: Tensor | None = None) -> Array:
        """Activations [R, F] of the detector's latents, of rows in order of conversation and position."""
        block_R = position_R // BLOCK
        if conversation_R is not None:
            block_R = block_R + conversation_R * (1 << 32)
        number_R = torch.unique_consecutive(block_R, return_inverse=True)[1]
        count, latents = int(number_R.max()) + 1 if len(number_R) else 0, len(self.latents_F)
        if not count:
            return np.zeros((0, latents))
        place_R = position_R % BLOCK
        padded = torch.zeros(count, BLOCK, x_RD.shape[1], dtype=x_RD.dtype, device=x_RD.device)
        padded[number_R.to(x_RD.device), place_R.to(x_RD.device)] = x_RD
        with torch.no_grad():
            codes = Codes.cat([sae.encode(rows) for rows in padded])
        column_N = torch.full((sae.dict_size,), latents)
        column_N[torch.from_numpy(self.latents_F)] = torch.arange(latents)
        active = torch.zeros(count * BLOCK, latents + 1, dtype=torch.float32)
        active.scatter_reduce_(1, column_N[codes.indices.cpu()], codes.values.float().cpu(), "amax")
        found: Array = active[number_R * BLOCK + place_R, :-1].double().numpy()
        return found

    def score(
        self, lm: LanguageModel, sae: SAE, conversations: Sequence[Conversation], recipe: Recipe
    ) -> Iterator[Scores]:
        """Scores of each conversation, in order; batches of them go through the language model together.

        Raises:
            CorpusError: a conversation is longer than a batch.
            TrainingError: the model gives rows that are not finite.
        """
        site = Site(self.about["site"])
        done = 0
        for part in scoped_rows(lm, conversations, [site], self.scope, recipe):
            active_RF = self.active(sae, part.rows[site], part.position_R, part.conversation_R)
            ends = np.searchsorted(part.conversation_R.numpy(), np.arange(done, part.stop + 1))
            for c in range(done, part.stop):
                here = slice(ends[c - done], ends[c - done + 1])
                yield self._scores(active_RF[here], part.position_R[here].numpy(), conversations[c])
            done = part.stop

    def _scores(self, active_TF: Array, position_T: NDArray[np.int64], conversation: Conversation) -> Scores:
        _, token_T, so_far_T = self.go_on(Running.start(len(self.weight_F)), active_TF)
        turns = []
        roles_T = conversation.roles[position_T]
        starts = np.flatnonzero((np.diff(position_T, prepend=-9) != 1) | (np.diff(roles_T, prepend=255) != 0))
        for start, stop in pairwise([*starts, len(position_T)]):
            score = self.go_on(Running.start(len(self.weight_F)), active_TF[start:stop])[2][-1]
            turns.append(Turn(ROLES[roles_T[start]], int(position_T[start]), float(score)))
        return Scores(float(so_far_T[-1]) if len(so_far_T) else self.bias, position_T, token_T, so_far_T, turns)

    def alarm(self, score: float) -> bool:
        """Whether a score is above the threshold."""
        return score > self.threshold

    def listed(self) -> list[dict[str, Any]]:
        """[{"sae", "latent", "weight"}], the largest weight first."""
        order_F = np.argsort(-np.abs(self.weight_F), kind="stable").tolist()
        sae = self.about["sae"]
        return [{"sae": sae, "latent": int(self.latents_F[f]), "weight": float(self.weight_F[f])} for f in order_F]

    def save(self, folder: Path) -> None:
        """Write the folder of a monitor, whole or not at all.

        Raises:
            FormatError: it exists and is not empty.
        """
        tensors = {"latents": self.latents_F, "weight": self.weight_F, **self.controls}
        with whole_folder(folder) as temporary:
            scope = {"roles": list(self.scope.roles), "start": self.scope.start, "stop": self.scope.stop}
            numbers = {"bias": self.bias, "threshold": self.threshold, "fpr": self.fpr}
            write_json(temporary / _FILE, {"version": VERSION, **self.about, "pool": self.pool, **scope, **numbers})
            save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, temporary / _WEIGHTS)
            write_checksums(temporary)

    @staticmethod
    def load(folder: Path) -> Detector:
        """Read a monitor.

        Raises:
            FormatError: a file is missing, damaged or of another version.
        """
        verify_folder(folder)
        about = read_object(folder / _FILE)
        if missing := sorted(_KEYS - about.keys()):
            raise FormatError(f"{folder / _FILE} lacks {', '.join(missing)}; it is no monitor, fit it again")
        if about["version"] != VERSION:
            raise FormatError(f"{folder} is a monitor of version {about['version']}; this qwenscope reads {VERSION}")
        try:
            tensors = load_file(folder / _WEIGHTS)
            latents_F, weight_F = tensors.pop("latents"), tensors.pop("weight")
            if latents_F.ndim != 1 or weight_F.shape != latents_F.shape or (latents_F < 0).any():
                raise ValueError("latents and weights do not fit")
            numbers = [float(about.pop(name)) for name in ("bias", "threshold", "fpr")]
            if not np.isfinite([*numbers, *weight_F]).all():
                raise ValueError("a number is not finite")
            scope = Scope(tuple(about.pop("roles")), about.pop("start"), about.pop("stop"))
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise FormatError(f"{folder} cannot be read ({error}); fit the monitor again") from None
        bias, threshold, fpr = numbers
        del about["version"]
        return Detector(latents_F, weight_F, bias, about.pop("pool"), scope, threshold, fpr, about, tensors)

    def sae(self, target: Target) -> SAE:
        """The SAE that the monitor was fitted on, among those of `target`.

        Raises:
            FormatError: it is not there, reads elsewhere, or has other weights.
        """
        id, site = self.about["sae"], self.about["site"]
        if id not in target.saes or target.sites[id].name != site:
            raise FormatError(f"{target.name} has no SAE {id} at {site}; the monitor was fitted on that one")
        if target.saes[id].digest() != self.about["sae_digest"]:
            raise FormatError(f"{id} of {target.name} has other weights than the SAE that the monitor was fitted on")
        if len(self.latents_F) and self.latents_F.max() >= target.saes[id].dict_size:
            raise FormatError(f"{id} has no latent {self.latents_F.max()}, which the monitor reads; fit it again")
        return target.saes[id]

    def check_model(self, lm: LanguageModel) -> None:
        """FormatError unless `lm` computes the rows of the model that the monitor was fitted on."""
        if lm.digest(Site(self.about["site"]).layer) != self.about["model_digest"]:
            revision = self.about["revision"] or "no revision"
            raise FormatError(f"{lm.name} has other weights than {self.about['model']} ({revision}) of the monitor")


def identity(target: Target, sae_id: str, lm: LanguageModel) -> dict[str, Any]:
    """What a monitor says of the model and the SAE that it is for."""
    return {
        "model": lm.name,
        "revision": lm.revision,
        "model_digest": lm.digest(target.sites[sae_id].layer),
        "sae": sae_id,
        "sae_digest": target.saes[sae_id].digest(),
        "site": target.sites[sae_id].name,
    }
