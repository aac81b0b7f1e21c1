"""What latents must be compared with before one says that training found something.

Legend: R rows, D hidden, N latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwenscope.sae.sae import SAE, random_directions
from qwenscope.seeds import derive_seed, generator

FROZEN_STEPS, FROZEN_ROWS, FROZEN_LR = 200, 512, 1e-3


def directions(sae: SAE, seed: int) -> Tensor:
    """As many random unit directions as the SAE has latents, float32 [N, D]."""
    return random_directions(sae.hidden_dim, sae.dict_size, derive_seed(seed, "random directions"), 0, sae.dict_size)


def frozen_decoder_sae(x_RD: Tensor, like: SAE, seed: int) -> SAE:
    """An SAE of the same size and activation whose decoder stays random: only its encoder learns to reconstruct.

    What such an SAE's latents find as well is no merit of learnt features (Korznikov et al. 2026, "Sanity checks for
    sparse autoencoders"). Trained for FROZEN_STEPS steps of FROZEN_ROWS of the rows given.
    """
    with torch.device("cpu"):
        sae = SAE(like.hidden_dim, like.dict_size, like.k, "topk", seed=derive_seed(seed, "frozen decoder"))
    sae.to(x_RD.device)
    x_RD = x_RD.float()
    scale = x_RD.std(0).norm().clamp(min=1e-9)
    with torch.no_grad():
        sae.pre_bias.copy_(x_RD.mean(0))
    sae.decoder.weight.requires_grad_(False)
    learning = [sae.encoder.weight, sae.encoder.bias, sae.pre_bias]
    optimizer = torch.optim.Adam(learning, lr=FROZEN_LR)
    random = generator(seed, "frozen decoder rows")
    with torch.enable_grad():
        for _ in range(FROZEN_STEPS):
            rows = torch.randint(len(x_RD), (FROZEN_ROWS,), generator=random).to(x_RD.device)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(sae(x_RD[rows]) / scale, x_RD[rows] / scale, reduction="sum") / FROZEN_ROWS
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return sae.eval()
