"""The windows of activations around firings, against a dense table of every activation."""

import torch

from qwenscope.features.statistics import BEFORE, WINDOW, Chunk, Firings

LATENTS, TOKENS, ACTIVE = 6, 700, 3


def chunk(generator: torch.Generator) -> Chunk:
    """Conversations of unlike lengths, a tenth of the tokens left out."""
    conversation_T = torch.repeat_interleave(torch.arange(5), torch.tensor([1, 40, 7, 452, 200]))
    token_R = (torch.rand(TOKENS, generator=generator) < 0.9).nonzero().squeeze(1)
    row_T = torch.full((TOKENS,), -1)
    row_T[token_R] = torch.arange(len(token_R))
    return Chunk(0, 12_345, token_R, row_T, conversation_T, conversation_T)


def test_windows_hold_what_a_dense_table_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    text = chunk(generator)
    dense_TN = torch.zeros(TOKENS, LATENTS)
    scores = torch.rand(len(text.token_R), LATENTS, generator=generator)
    scores[:, 0] = 2.0  # one latent fires everywhere, up to both ends of the chunk
    chosen = scores.topk(ACTIVE, dim=1).indices
    dense_TN[text.token_R] = torch.zeros_like(scores).scatter_(1, chosen, scores.gather(1, chosen))
    order = torch.randperm(int(dense_TN.count_nonzero()), generator=generator)
    token_P, latent_P = (part[order] for part in dense_TN.nonzero(as_tuple=True))

    windows = Firings(latent_P, token_P, dense_TN[token_P, latent_P], text).windows(latent_P, token_P)

    for window, latent, token in zip(windows, latent_P.tolist(), token_P.tolist(), strict=True):
        for place, value in enumerate(window.tolist()):
            there = token + place - BEFORE
            inside = 0 <= there < TOKENS and text.conversation_T[there] == text.conversation_T[token]
            assert value == (dense_TN[there, latent].item() if inside else 0.0)
    assert windows.shape == (len(token_P), WINDOW)
