"""The sparse autoencoder (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", eq. 2-3).

    latents        = activation(encoder(x - pre_bias)), for TopK: TopK(ReLU(encoder(x - pre_bias)))
    reconstruction = decoder(latents) + pre_bias

A transcoder (Dunefsky et al. 2024) predicts the rows at another site, its configuration's `target`, instead of those
it reads: prediction = decoder(latents) + decoder.bias, and with a skip connection + skip(x).

Legend: B rows (tokens), D hidden, N latents (dictionary size), K places of a row's codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from qwenscope.errors import FormatError
from qwenscope.sae.activation import Activation, TopK, activation_of, described
from qwenscope.sae.autograd import sparse_decode, sparse_encode
from qwenscope.sae.files import find_sae, read_sae, write_sae
from qwenscope.sae.rows import Rows, as_rows

_BLOCK = 1 << 16  # latents drawn at once


@dataclass(frozen=True, slots=True)
class Codes:
    """The active latents of a batch; places beyond a row's positive pre-activations hold the value 0.

    values: [B, K], at least 0. indices: [B, K] int64, distinct within a row where the values are above 0. dict_size: N.
    """

    values: Tensor
    indices: Tensor
    dict_size: int

    def dense(self) -> Tensor:
        """The same latents as [B, N], zeros included."""
        shape = (*self.values.shape[:-1], self.dict_size)
        return self.values.new_zeros(shape).scatter_add(-1, self.indices, self.values)

    @classmethod
    def cat(cls, parts: Sequence[Codes]) -> Codes:
        """Codes of several batches [B, K] as those of one; rows with fewer places get places of value 0."""
        most = max(part.values.shape[-1] for part in parts)

        def padded(values_BK: Tensor) -> Tensor:
            return nn.functional.pad(values_BK, (0, most - values_BK.shape[-1]))

        values_BK = torch.cat([padded(part.values) for part in parts])
        return cls(values_BK, torch.cat([padded(part.indices) for part in parts]), parts[0].dict_size)


def random_directions(hidden_dim: int, dict_size: int, seed: int | None, start: int, stop: int) -> Tensor:
    """Rows start..stop of the random unit decoder [N, D] of `SAE(..., seed=seed)`, without holding all of it.

    The others before them are drawn too, block by block: a slice is the same whoever asks for it.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    blocks = []
    for begin in range(0, stop, _BLOCK):
        block = torch.randn(min(_BLOCK, dict_size - begin), hidden_dim, generator=generator, dtype=torch.float32)
        if begin + _BLOCK > start:
            blocks.append(block[max(0, start - begin) : stop - begin])
    return nn.functional.normalize(torch.cat(blocks), dim=1)


class SAE(nn.Module):
    """A sparse autoencoder over rows of a residual stream, with any activation of `activation.ACTIVATIONS`.

    State dict (float32): `encoder.weight` [N, D], `encoder.bias` [N], `decoder.weight` [D, N] with unit-norm columns,
    `pre_bias` [D], and `threshold` [N] where the activation has one. A new SAE has random unit decoder columns and an
    encoder tied to them, which `SAETrainer.calibrate` scales.

    Args:
        hidden_dim: D, width of a row.
        dict_size: N, number of latents.
        k: active latents per row, at most N: all rows', their mean or their most, as the activation has it.
        activation: its name.
        seed: of the random decoder; None draws from torch's global generator.

    Raises:
        FormatError: a size below 1, k above dict_size, or an unknown activation.
    """

    def __init__(self, hidden_dim: int, dict_size: int, k: int, activation: str, *, seed: int | None = None) -> None:
        super().__init__()
        if min(hidden_dim, dict_size, k) < 1 or k > dict_size:
            raise FormatError(
                f"no SAE has hidden_dim={hidden_dim}, dict_size={dict_size}, k={k}: "
                "each must be at least 1, and k at most dict_size"
            )
        self.activation: Activation = activation_of(activation, k)
        self.config: dict[str, Any] = {"hidden_dim": hidden_dim, "dict_size": dict_size, "k": k}
        self.config |= described(activation)
        decoder_ND = random_directions(hidden_dim, dict_size, seed, 0, dict_size)
        self.encoder = nn.Linear(hidden_dim, dict_size, device="meta")
        self.encoder.weight = nn.Parameter(decoder_ND.clone())
        self.encoder.bias = nn.Parameter(torch.zeros(dict_size, dtype=torch.float32))
        self.decoder = nn.Linear(dict_size, hidden_dim, bias=False, device="meta")
        # A transposed view: [D, N] to the outside, one contiguous row per latent in memory for the sparse decode.
        self.decoder.weight = nn.Parameter(decoder_ND.T)
        self.pre_bias = nn.Parameter(torch.zeros(hidden_dim, dtype=torch.float32))
        threshold_N = torch.zeros(dict_size, dtype=torch.float32) if self.activation.has_threshold else None
        self.threshold: Tensor | None
        self.register_buffer("threshold", threshold_N)
        self.skip: nn.Linear | None = None

    @staticmethod
    def of(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> SAE:
        """An SAE with that configuration around tensors that are there already, named as in its state dict.

        Of `TopKSAE` where the activation is TopK, which a configuration need not name.
        """
        activation = config.get("activation", TopK.name)
        hidden_dim, dict_size, k = config["hidden_dim"], config["dict_size"], config["k"]
        with torch.device("meta"):
            topk = activation == TopK.name
            sae = TopKSAE(hidden_dim, dict_size, k) if topk else SAE(hidden_dim, dict_size, k, activation)
            if "target" in config:
                sae.decoder = nn.Linear(dict_size, config["target_dim"])
            if config.get("skip"):
                sae.skip = nn.Linear(hidden_dim, config["target_dim"], bias=False)
        sae.config = dict(config)
        sae.load_state_dict(weights, assign=True)
        return sae

    @property
    def hidden_dim(self) -> int:
        """D, width of a row."""
        return int(self.config["hidden_dim"])

    @property
    def target_dim(self) -> int:
        """Width of a reconstruction: D, but for a transcoder."""
        return int(self.config.get("target_dim", self.hidden_dim))

    @property
    def dict_size(self) -> int:
        """N, number of latents."""
        return int(self.config["dict_size"])

    @property
    def k(self) -> int:
        """Active latents per row, as the activation means it."""
        return self.activation.k

    def encode(self, x_BD: Rows) -> Codes:
        """The active latents of each row [..., D], a tensor or array of any floating dtype.

        Differentiable but for the threshold.

        Raises:
            FormatError: rows that are no floating-point numbers, or of another width.
        """
        x_BD = as_rows(x_BD)
        if x_BD.shape[-1:] != (self.hidden_dim,):
            raise FormatError(f"rows of shape {list(x_BD.shape)} do not fit an SAE of width {self.hidden_dim}")
        rows_BD = (x_BD.to(self.pre_bias.dtype) - self.pre_bias).reshape(-1, self.hidden_dim)
        select = partial(self.activation.select, threshold_N=self.threshold)
        values_BK, indices_BK = sparse_encode(rows_BD, self.encoder.weight, self.encoder.bias, select)
        shape = (*x_BD.shape[:-1], values_BK.shape[-1])
        return Codes(values_BK.view(shape), indices_BK.view(shape), self.dict_size)

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction [..., D] of `codes`, of any number of latents per row; differentiable.

        Of a transcoder with a skip connection, the latents' part of it: `reconstruct` knows the rows too.
        """
        latents = codes.values.shape[-1]
        values_BK, indices_BK = codes.values.reshape(-1, latents), codes.indices.reshape(-1, latents)
        bias_D = self.pre_bias if self.decoder.bias is None else self.decoder.bias
        x_BD = sparse_decode(values_BK, indices_BK, self.decoder.weight.T.contiguous()) + bias_D
        return x_BD.view(*codes.values.shape[:-1], self.target_dim)

    def reconstruct(self, x_BD: Rows, codes: Codes) -> Tensor:
        """Reconstruction [..., D] of the rows [..., D] that `codes` are of; a transcoder's prediction."""
        x_hat_BD = self.decode(codes)
        return x_hat_BD if self.skip is None else x_hat_BD + self.skip(as_rows(x_BD).to(self.skip.weight.dtype))

    def forward(self, x_BD: Rows) -> Tensor:
        """Reconstruction of rows [..., D] -> [..., D], in the SAE's dtype; differentiable."""
        return self.reconstruct(x_BD, self.encode(x_BD))

    def save(self, folder: Path | str) -> None:
        """Write `config.json` and `weights.safetensors` into `folder` (made if missing), each whole or not at all."""
        write_sae(Path(folder), self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        sae_id: str | None = None,
        revision: str | None = None,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Load a verified SAE from a local folder or a Hugging Face Hub repository.

        Args:
            path_or_repo: folder with `config.json` and `weights.safetensors` (or with `sae_id` folders that
                have them: a release, a complete run), or a repository `org/name`.
            sae_id: folder inside it; None means `path_or_repo` itself.
            revision: commit, branch or tag on the Hub; a folder has none.
            device: where the weights go.

        Raises:
            FormatError: no such SAE (the message lists those there are), one of another activation than the class, or
                a file is missing, damaged, hostile, or does not fit the configuration.
            HubError: the repository or revision does not exist, or the Hub stays out of reach.
        """
        folder, root = find_sae(path_or_repo, sae_id, revision)
        sae = SAE.of(*read_sae(folder, root)).to(device)
        if not isinstance(sae, cls):
            raise FormatError(f"{folder} has the activation {sae.activation.name}; load it by SAE.from_pretrained")
        return sae

    def digest(self) -> str:
        """16 hex digits of the weights, by which SAEs are told apart; a gigabyte takes about a second."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class TopKSAE(SAE):
    """The SAE whose rows have their k largest latents active: latents = TopK(ReLU(encoder(x - pre_bias))).

    Args:
        hidden_dim: D, width of a row.
        dict_size: N, number of latents.
        k: K, latents kept per row, at most N.
        seed: of the random decoder; None draws from torch's global generator.

    Raises:
        FormatError: a size below 1, or k above dict_size.
    """

    def __init__(self, hidden_dim: int, dict_size: int, k: int, *, seed: int | None = None) -> None:
        super().__init__(hidden_dim, dict_size, k, TopK.name, seed=seed)
