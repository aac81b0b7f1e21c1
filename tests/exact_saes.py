"""SAEs and rows on which float32 arithmetic is exact, so that any order of summation gives the same bits.

Weights and rows are small multiples of powers of two; every latent's bias has its own offset below the spacing of the
products, so no two pre-activations are equal and every correct TopK selects the same latents.
"""

from __future__ import annotations

import torch

from qwenscope import TopKSAE

HIDDEN_DIM, DICT_SIZE, K = 16, 64, 6


def exact_sae(seed: int = 0, **config: object) -> TopKSAE:
    """A TopK SAE with dyadic weights: unit decoder columns of four entries of 1/2 or -1/2."""
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE(HIDDEN_DIM, DICT_SIZE, K, seed=seed)
    encoder = torch.randint(-2, 3, (DICT_SIZE, HIDDEN_DIM), generator=generator) / 4
    bias = torch.randint(-4, 5, (DICT_SIZE,), generator=generator) / 16 + torch.arange(DICT_SIZE) / 1024
    decoder = torch.zeros(DICT_SIZE, HIDDEN_DIM)
    for row in decoder:
        places = torch.randperm(HIDDEN_DIM, generator=generator)[:4]
        row[places] = torch.randint(0, 2, (4,), generator=generator).float() - 0.5
    with torch.no_grad():
        sae.encoder.weight.copy_(encoder)
        sae.encoder.bias.copy_(bias)
        sae.decoder.weight.copy_(decoder.T)
        sae.pre_bias.copy_(torch.randint(-4, 5, (HIDDEN_DIM,), generator=generator) / 4)
    sae.config |= config
    return sae


def exact_rows(rows: int = 200, seed: int = 1) -> torch.Tensor:
    """Rows [rows, HIDDEN_DIM] of quarters."""
    return torch.randint(-8, 9, (rows, HIDDEN_DIM), generator=torch.Generator().manual_seed(seed)) / 4


def same(a: TopKSAE, b: TopKSAE, x_BD: torch.Tensor) -> bool:
    """Whether codes and reconstructions of two SAEs are equal bit for bit."""
    return torch.equal(a.encode(x_BD).dense(), b.encode(x_BD).dense()) and torch.equal(a(x_BD), b(x_BD))
