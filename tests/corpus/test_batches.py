"""Batches: exact content, the budget, and the least padding of all cuts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenscope.errors import CorpusError
from qwenscope.lm.batches import cut, make_batches

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(60, 300))
def test_rows_are_whole_padded_right_and_within_budget(lengths: list[int], budget: int) -> None:
    conversations = [np.arange(1, length + 1, dtype=np.int32) + 100 * i for i, length in enumerate(lengths)]
    batches = make_batches(lengths, conversations, budget, -1, CPU)
    assert sorted(member for batch in batches for member in batch.members) == list(range(len(lengths)))
    for batch in batches:
        assert batch.input_ids_CT.numel() <= budget
        assert batch.input_ids_CT.shape == (len(batch.members), max(batch.lengths_C))
        for row, length, member in zip(batch.input_ids_CT, batch.lengths_C, batch.members, strict=True):
            assert row[:length].tolist() == conversations[member].tolist()
            assert (row[length:] == -1).all()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 99_999), min_size=1, max_size=9), st.integers(99_999, 300_000), st.sampled_from([CPU, GPU])
)
def test_no_cut_costs_less(lengths: list[int], budget: int, device: torch.device) -> None:
    ordered = sorted(lengths, reverse=True)
    each = 512 if device == CPU or sum(lengths) < 131_072 else min(2048, sum(lengths) // 256)

    def cost(batches: list[list[int]]) -> float:
        sizes = [len(batch) * batch[0] for batch in batches]
        return sum(sizes) + each * len(sizes) if max(sizes) <= budget else float("inf")

    def cuts() -> list[list[list[int]]]:
        places = range(1, len(ordered))
        chosen = (c for n in range(len(ordered)) for c in itertools.combinations(places, n))
        return [[ordered[a:b] for a, b in itertools.pairwise((0, *c, len(ordered)))] for c in chosen]

    ours = cost([[lengths[member] for member in members] for members in cut(lengths, budget, device)])
    assert ours == min(map(cost, cuts()))


def test_the_same_lengths_give_the_same_batches() -> None:
    lengths = [5, 9, 5, 9, 1]
    assert cut(lengths, 20, CPU) == cut(list(lengths), 20, torch.device("cpu"))
    assert cut(lengths, 20, GPU) == cut(lengths, 20, torch.device("cuda:1"))
    assert [member for members in cut(lengths, 20, CPU) for member in members] == [1, 3, 0, 2, 4]
    assert cut([], 20, CPU) == []


def test_a_conversation_over_the_budget_is_named() -> None:
    with pytest.raises(CorpusError, match=r"21 tokens exceeds the budget of 20.*batch_tokens"):
        cut([3, 21], 20, CPU)
