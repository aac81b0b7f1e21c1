"""What a latent's weights say by themselves, and which latents fire together: block by block, in bounded memory.

Legend: D hidden, N latents, M latents of a block, V vocabulary, S sampled tokens, K active latents.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from qwenscope.evaluation.pairs import unit_decoder
from qwenscope.sae.sae import SAE

Ranking = tuple[Tensor, Tensor]
"""(scores [M, top], indices [M, top] int64), best first."""


@torch.no_grad()
def token_effects(
    directions_MD: Tensor, norm: nn.Module, unembedding_VD: Tensor, top: int
) -> tuple[Ranking, Ranking, Tensor]:
    """Tokens that directions push up and down: the logit lens (nostalgebraist 2020) on decoder directions.

    Each direction goes through the final norm by itself and then the unembedding; scores are in units of the
    standard deviation over the vocabulary, so that they compare between latents and layers. An approximation that grows
    worse the more layers follow the hook point.

    Returns:
        (promoted, suppressed, spread [M]): rankings in standard deviations, and that deviation in logits.
    """
    directions_MD = norm(directions_MD.to(unembedding_VD.device, unembedding_VD.dtype)).to(unembedding_VD.dtype)
    logits_MV = (directions_MD @ unembedding_VD.T).float()
    spread_M, mean_M = torch.std_mean(logits_MV, dim=1)
    logits_MV = (logits_MV - mean_M.unsqueeze(1)) / spread_M.unsqueeze(1).clamp(min=1e-12)
    up, down = logits_MV.topk(top, dim=1), logits_MV.topk(top, dim=1, largest=False)
    return (up.values.cpu(), up.indices.cpu()), (down.values.cpu(), down.indices.cpu()), spread_M.cpu()


@torch.no_grad()
def neighbours(sae: SAE, start: int, stop: int, top: int) -> Ranking:
    """Of latents start..stop the latents of the same SAE with the largest decoder cosine, itself left out."""
    directions_ND = unit_decoder(sae)
    cosines_MN = directions_ND[start:stop] @ directions_ND.T
    cosines_MN[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
    found = cosines_MN.topk(min(top, len(directions_ND) - 1), dim=1)
    return found.values.cpu(), found.indices.cpu()


@torch.no_grad()
def counterparts(sae: SAE, other: SAE, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Of latents start..stop the nearest latent of another SAE by decoder cosine: (cosines [M], indices [M])."""
    best = (unit_decoder(sae)[start:stop] @ unit_decoder(other).T).max(dim=1)
    return best.values.cpu(), best.indices.cpu()


class CoActivation:
    """Which latents fire together, from a sample of tokens."""

    def __init__(self, latents_SK: Tensor, latents: int) -> None:
        """`latents_SK`: int32 active latents per sampled token, -1 where fewer are active."""
        token_P, place_P = (latents_SK >= 0).nonzero(as_tuple=True)
        latent_P = latents_SK[token_P, place_P].numpy()
        ones = np.ones(len(latent_P), dtype=np.float32)
        self._fires_SN = csr_matrix((ones, (token_P.numpy(), latent_P)), shape=(len(latents_SK), latents))
        self._by_latent = self._fires_SN.tocsc()
        self.fired_N = torch.from_numpy(np.asarray(self._fires_SN.sum(0)).ravel())

    def of(self, start: int, stop: int, top: int) -> tuple[Ranking, Tensor]:
        """Latents most correlated with each of start..stop: phi coefficient of firing, and tokens shared [M, top].

        Latents that never fire with it have a phi of 0 or less.
        """
        together_MN = torch.from_numpy((self._by_latent[:, start:stop].T @ self._fires_SN).toarray())
        tokens = float(self._fires_SN.shape[0])
        share_N = self.fired_N / max(tokens, 1.0)
        spread_N = (share_N * (1 - share_N)).clamp(min=1e-12).sqrt()
        covariance_MN = together_MN / max(tokens, 1.0) - share_N[start:stop, None] * share_N
        phi_MN = covariance_MN / (spread_N[start:stop, None] * spread_N)
        phi_MN[together_MN == 0] = 0.0
        phi_MN[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
        found = phi_MN.topk(min(top, phi_MN.shape[1] - 1), dim=1)
        return (found.values, found.indices), together_MN.gather(1, found.indices)
