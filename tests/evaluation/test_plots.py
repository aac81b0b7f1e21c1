"""Axes of the report's plots: round numbers that fit, whole ones for layers, one scale for what stands side by side."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from qwenscope.evaluation.plots import WIDTH, Dot, Line, Row, dots, forest, lines, steps, ticks

TICK = re.compile(r'<text class="tick" text-anchor="(\w+)" x="([\d.]+)" y="[\d.]+">([^<]+)<')


def tick_texts(figure: str, anchor: str) -> list[str]:
    """What stands at an axis: x ticks are centred (`middle`), y ticks end at the axis (`end`)."""
    return [text for found, _, text in TICK.findall(figure) if found == anchor]


@pytest.mark.parametrize(("low", "high"), [(6, 35), (2, 3), (0, 1), (7, 7), (0, 39), (34, 35)])
def test_layers_stand_at_whole_numbers(low: int, high: int) -> None:
    found = ticks(low, high, 6, whole=True)
    assert all(tick == int(tick) for tick in found)
    assert found[0] <= low <= high <= found[-1]
    assert len(found) >= 2
    drawn = dots("", [Dot(low, 0.1, "a", "other"), Dot(high, 0.2, "b", "other")], "layer", "")
    assert all("." not in text for text in tick_texts(drawn, "middle"))


def test_what_is_compared_shares_a_scale() -> None:
    small, large = Dot(1, 0.01, "a", "other"), Dot(1, 0.9, "b", "other", interval=(0.8, 1.2))
    ends = [*small.ends, *large.ends]
    first, second = (tick_texts(dots("", [dot], "layer", "", include=ends), "end") for dot in (small, large))
    assert first == second
    rows = Row("a", 0.01, "other"), Row("b", -0.5, "other", interval=(-0.6, -0.4))
    ends = [end for row in rows for end in row.ends]
    first, second = (tick_texts(forest("", [row], "", include=ends), "middle") for row in rows)
    assert first == second
    one, other = Line("", [0, 1, 2], [5, 1], "other"), Line("", [0, 1, 2], [70, 2], "other")
    first, second = (tick_texts(steps("", [line], "", "", include=(70,)), "end") for line in (one, other))
    assert first == second


def test_an_axis_is_no_wider_than_its_values() -> None:
    drawn = lines("", [Line("", [7, 8, 9], [0.91, 0.95, 0.93], "other")], "layer", "")
    assert float(tick_texts(drawn, "end")[0]) >= 0.9


@pytest.mark.parametrize("scale", [1e-4, 1.0, 123456.0])
def test_ticks_neither_overlap_nor_leave_the_plot(scale: float) -> None:
    drawn = forest("", [Row("a", -0.00275 * scale, "other"), Row("b", 0.0031 * scale, "other")], "")
    spans = [(float(x), 7.8 * len(text) / 2) for anchor, x, text in TICK.findall(drawn) if anchor == "middle"]
    assert all(x + half <= WIDTH for x, half in spans)
    assert all(b - a >= half + other for (a, half), (b, other) in pairwise(spans))
