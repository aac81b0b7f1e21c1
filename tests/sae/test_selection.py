"""Top-k selection: exact in every precision that says so, certified rows, ties, odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwenscope.sae.eight_bit import EightBit
from qwenscope.sae.selection import CHUNK_ROWS, Selector, best_precision, eight_bits_pay, top_k


def check_top_k(scores: Tensor, k: int) -> None:
    values, indices = top_k(scores, k)
    expected = scores.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(values.sort(dim=1, descending=True).values, expected)
    assert torch.equal(scores.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize(
    ("n", "k"), [(40, 1), (40, 40), (64, 2), (1000, 7), (1024, 20), (1024, 33), (4096, 64), (37, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_stages_find_the_largest(n: int, k: int, dtype: torch.dtype) -> None:
    scores = torch.randn(20, n, generator=torch.Generator().manual_seed(n + k)).to(dtype)
    scores[0] = 1.0  # all tied
    scores[1] = scores[1].round()  # many ties
    scores[2] = -scores[2].abs()
    scores[3] = torch.arange(n).to(dtype)  # the largest in the last columns of each group
    scores[4] = scores[3].flip(0)
    scores[5, : n // 2] = 50.0
    check_top_k(scores, k)


def selected(rows: int, hidden: int, n: int, k: int, eight_bits: bool = False) -> tuple[int, int]:
    """(rows whose support differs from a float32 top-k beyond rounding, rows done again) of exact on Gaussian data."""
    generator = torch.Generator().manual_seed(rows + n)
    weight = torch.nn.functional.normalize(torch.randn(n, hidden, generator=generator), dim=1)
    bias = 0.05 * torch.randn(n, generator=generator)
    selector, shadow = Selector(k, "exact"), EightBit(weight) if eight_bits else weight.bfloat16()
    misses = redone = 0
    for start in range(0, rows, 4096):
        x = torch.randn(min(4096, rows - start), hidden, generator=generator)
        result = selector(x, weight, shadow, bias)
        pre = torch.addmm(bias, x, weight.T)
        threshold = pre.topk(k, dim=1).values[:, -1:]
        inside = torch.zeros_like(pre, dtype=torch.bool).scatter(1, result.indices, True)
        slack = 1e-5 * threshold.abs().clamp_min(1.0)
        wrong = (inside & (pre < threshold - slack)) | (~inside & (pre > threshold + slack))
        misses += int(wrong.any(1).sum())
        redone += result.redone
        torch.testing.assert_close(result.values, pre.gather(1, result.indices).relu(), rtol=1e-4, atol=1e-5)
    return misses, redone


@pytest.mark.parametrize(("hidden", "n", "k"), [(64, 1024, 8), (96, 2048, 32), (33, 500, 5), (16, 24, 8), (8, 10, 10)])
def test_exact_selects_what_float32_selects(hidden: int, n: int, k: int) -> None:
    misses, _ = selected(1000, hidden, n, k)
    assert misses == 0


def test_rows_without_certificate_are_done_again() -> None:
    """Scores that differ by less than bfloat16 can see: nothing is certified, everything is still right."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(1, 64, generator=generator)
    weight = base + 1e-3 * torch.randn(800, 64, generator=generator)
    x = base + 0.1 * torch.randn(CHUNK_ROWS + 3, 64, generator=generator)
    result = Selector(10, "exact")(x, weight, weight.bfloat16(), torch.zeros(800))
    assert result.redone > CHUNK_ROWS // 2
    expected = (x @ weight.T).topk(10, dim=1).values
    torch.testing.assert_close(result.values.sort(1, descending=True).values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("eight_bits", [False, True])
def test_certificates_over_a_million_rows(eight_bits: bool) -> None:
    misses, redone = selected(1_000_000, 64, 2048, 16, eight_bits)
    assert misses <= 1
    assert redone < 10_000


def test_named_latents_come_along() -> None:
    generator = torch.Generator().manual_seed(4)
    x, weight = torch.randn(300, 16, generator=generator), torch.randn(64, 16, generator=generator)
    bias, names = torch.randn(64, generator=generator), torch.tensor([3, 17, 60])
    result = Selector(4, "fp32")(x, weight, weight, bias, names)
    assert result.named is not None
    torch.testing.assert_close(result.named, (x @ weight.T + bias)[:, names])
    assert Selector(4, "fp32")(x, weight, weight, bias).named is None


def test_the_chunk_is_reused_but_results_are_not() -> None:
    generator = torch.Generator().manual_seed(6)
    x, weight = torch.randn(50, 16, generator=generator), torch.randn(64, 16, generator=generator)
    selector = Selector(4, "fp32")
    first = selector(x, weight, weight, torch.zeros(64))
    kept = first.values.clone()
    selector(-x, weight, weight, torch.zeros(64))
    assert torch.equal(first.values, kept)


def test_small_saes_and_float64_are_multiplied_plainly() -> None:
    assert best_precision(torch.randn(512, 64)) == "fp32"
    assert best_precision(torch.randn(4096, 256).double()) == "fp32"
    assert best_precision(torch.randn(4096, 256)) in ("fp32", "exact")
    assert not eight_bits_pay(torch.randn(512, 64))
    assert not eight_bits_pay(torch.randn(4096, 256).double())
