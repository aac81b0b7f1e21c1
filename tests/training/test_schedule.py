"""The learning rate over a run, counted in tokens."""

from __future__ import annotations

import pytest

from qwenscope.training.schedule import learning_rate


def curve(batches: list[int], **options: object) -> list[float]:
    done, rates = 0, []
    for batch in batches:
        rates.append(learning_rate(2.0, done, batch, **options))  # type: ignore[arg-type]
        done += batch
    return rates


def test_warmup_constant_decay() -> None:
    rates = curve([10] * 100, tokens=1000, warmup_tokens=100, decay_share=0.2)
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10:80] == [2.0] * 70
    assert rates[80:] == pytest.approx([2.0 * left / 20 for left in range(20, 0, -1)])


def test_it_ends_near_zero_whatever_the_batches() -> None:
    rates = curve([97] * 10 + [30], tokens=1000, warmup_tokens=0, decay_share=0.5)
    assert 0 < rates[-1] <= 2.0 * 30 / 500 + 1e-12
    assert learning_rate(2.0, 1000, 10, tokens=1000) == 0.0
    assert learning_rate(2.0, 2000, 10, tokens=1000) == 0.0


def test_without_an_end_the_rate_stays() -> None:
    assert curve([10] * 5, tokens=None, warmup_tokens=20) == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_no_warmup_no_decay() -> None:
    assert curve([10] * 3, tokens=30, warmup_tokens=0, decay_share=0.0) == [2.0, 2.0, 2.0]


def test_overlapping_warmup_and_decay_take_the_lower() -> None:
    rates = curve([10] * 10, tokens=100, warmup_tokens=100, decay_share=1.0)
    assert max(rates) == pytest.approx(1.0)
    assert rates[0] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.2)
