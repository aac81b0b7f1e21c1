"""What a latent's weights say by themselves, and which latents fire together: block by block, in bounded memory.

Legend: D hidden, N latents, M latents of a block, V vocabulary, S sampled tokens, K active latents, A alive latents,
H histogram bins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA
from torch import Tensor, nn

from qwenscope.evaluation.pairs import unit_decoder
from qwenscope.sae.sae import SAE

Ranking = tuple[Tensor, Tensor]
"""(scores [M, top], indices [M, top] int64), best first."""


LOGIT_REACH, BINS_PER_SD = 16, 4
"""A logit histogram spans so many standard deviations to either side, its end bins take the rest."""
LOGIT_BINS = 2 * LOGIT_REACH * BINS_PER_SD


class TokenEffects(NamedTuple):
    """What directions do to the logits; scores are standard deviations from the mean over the vocabulary."""

    promoted: Ranking
    suppressed: Ranking
    spread_M: Tensor
    """That deviation, in logits."""
    histogram_MH: Tensor
    """int64 [M, LOGIT_BINS]: how many tokens have which score."""


@torch.no_grad()
def token_effects(directions_MD: Tensor, norm: nn.Module, unembedding_VD: Tensor, top: int) -> TokenEffects:
    """Tokens that directions push up and down: the logit lens (nostalgebraist 2020) on decoder directions.

    Each direction goes through the final norm by itself and then the unembedding; scores are in units of the
    standard deviation over the vocabulary, so that they compare between latents and layers. An approximation that grows
    worse the more layers follow the hook point.
    """
    directions_MD = norm(directions_MD.to(unembedding_VD.device, unembedding_VD.dtype)).to(unembedding_VD.dtype)
    logits_MV = (directions_MD @ unembedding_VD.T).float()
    spread_M, mean_M = torch.std_mean(logits_MV, dim=1)
    deviation_M1 = spread_M.clamp(min=1e-12).unsqueeze(1)

    def ranking(largest: bool) -> Ranking:
        found = logits_MV.topk(top, dim=1, largest=largest)
        return ((found.values - mean_M.unsqueeze(1)) / deviation_M1).cpu(), found.indices.cpu()

    promoted, suppressed = ranking(True), ranking(False)
    # In place, and row by row: bins of a whole block as integers would take as much memory again.
    bins_MV = logits_MV.sub_(mean_M.unsqueeze(1)).mul_(BINS_PER_SD / deviation_M1).add_(LOGIT_BINS // 2)
    histogram = [torch.bincount(row_V.clamp_(0, LOGIT_BINS - 1).int(), minlength=LOGIT_BINS) for row_V in bins_MV]
    return TokenEffects(promoted, suppressed, spread_M.cpu(), torch.stack(histogram).cpu())


@torch.no_grad()
def principal_plane(sae: SAE, alive_A: NDArray[np.int64]) -> tuple[NDArray[np.float64], list[float]]:
    """Latents by their unit decoder directions' first two principal components (scikit-learn, exact).

    The same SAE and latents give the same plane, turned the same way.

    Returns:
        (xy [A, 2], shares): places whose largest coordinate is 1 or -1, and how much of the directions' variance lies
        along either axis. Fewer than three latents span no plane and stand at 0.
    """
    if len(alive_A) < 3:
        return np.zeros((len(alive_A), 2)), [0.0, 0.0]
    pca = PCA(n_components=2, svd_solver="covariance_eigh")
    xy_A2 = pca.fit_transform(unit_decoder(sae)[torch.from_numpy(alive_A)].float().cpu().numpy()).astype(np.float64)
    return xy_A2 / max(float(np.abs(xy_A2).max()), 1e-12), [float(share) for share in pca.explained_variance_ratio_]


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
