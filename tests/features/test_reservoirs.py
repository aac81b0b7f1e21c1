"""Tables of the best entries against a plain sort, ties included."""

from __future__ import annotations

import torch

from qwenscope.features.reservoirs import LatentTable, context_keys, order_by_group


def test_order_by_group_is_two_stable_sorts() -> None:
    random = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 9, (500,), generator=random) * 200_000_000
    keys = torch.randint(0, 6, (500,), generator=random).float() / 3
    keys[torch.rand(500, generator=random) < 0.1] = -torch.inf
    by_key = torch.sort(keys, descending=True, stable=True).indices
    expected = by_key[torch.sort(groups[by_key], stable=True).indices]
    assert torch.equal(order_by_group(groups, keys), expected)
    assert order_by_group(groups[:0], keys[:0]).tolist() == []


def test_context_keys_are_alike_where_the_last_tokens_of_a_conversation_are() -> None:
    random = torch.Generator().manual_seed(2)
    tokens, conversations = torch.randint(0, 2, (900,), generator=random), torch.arange(900) // 30
    keys = context_keys(tokens, conversations, 4)
    texts = [tuple(tokens[max(t - t % 30, t - 3) : t + 1].tolist()) for t in range(900)]
    found = {text: {int(key) for key, own in zip(keys, texts, strict=True) if own == text} for text in set(texts)}
    assert all(len(of) == 1 for of in found.values())
    assert len({min(of) for of in found.values()}) == len(found) > 20
    assert context_keys(tokens[:2], conversations[:2], 4).tolist() == keys[:2].tolist()


def test_a_table_keeps_the_best_of_all_offers_and_the_earlier_of_equals() -> None:
    check_table(contexts=10**6)


def test_a_table_keeps_a_context_once() -> None:
    check_table(contexts=6)


def check_table(contexts: int) -> None:
    """Offers of random entries, each of one of `contexts` contexts, against sorted lists."""
    random = torch.Generator().manual_seed(1)
    table = LatentTable(latents=7, entries=4, window=3)
    offered: list[tuple[int, float, int, int]] = []
    for start in range(0, 3000, 100):
        latents = torch.randint(0, 6, (60,), generator=random)  # the last latent never fires
        keys = torch.randint(1, 40, (60,), generator=random).float()
        addresses = start + torch.arange(60)
        context = torch.randint(0, contexts, (60,), generator=random)
        table.offer(latents, keys, keys + 0.5, addresses, context, lambda chosen, k=keys: k[chosen, None].expand(-1, 3))
        offered += zip(latents.tolist(), keys.tolist(), addresses.tolist(), context.tolist(), strict=True)
    for latent in range(7):
        ordered = sorted((entry for entry in offered if entry[0] == latent), key=lambda e: (-e[1], e[2]))
        best = list({entry[3]: entry for entry in reversed(ordered)}.values())
        best = sorted(best, key=lambda e: (-e[1], e[2]))[:4]
        order = sorted(range(4), key=lambda m: (-table.keys_NM[latent, m], table.addresses_NM[latent, m]))
        held = [m for m in order if table.addresses_NM[latent, m] >= 0]
        assert [int(table.addresses_NM[latent, m]) for m in held] == [address for _, _, address, _ in best]
        assert [float(table.keys_NM[latent, m]) for m in held] == [key for _, key, _, _ in best]
        assert [float(table.values_NM[latent, m]) for m in held] == [key + 0.5 for _, key, _, _ in best]
        assert [table.windows_NMW[latent, m].tolist() for m in held] == [[key] * 3 for _, key, _, _ in best]
