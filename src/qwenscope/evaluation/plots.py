"""Small plots as inline SVG: no fonts, scripts or colours of their own, so that a page's CSS rules both light and dark.

Marks carry classes (`deltanet`, `attention`, `other`, `first`, `second`, and `dash1` ... for further series of one
kind); each mark has a <title>, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 380, 236
LEFT, RIGHT, TOP, BOTTOM = 44, 20, 24, 34
FOREST_LEFT, ROW = 104, 26
CHARACTER = 7.8  # width of a tick's digit where plots are drawn smallest


@dataclass(frozen=True)
class Dot:
    """A value with its interval, if it has one."""

    x: float
    y: float
    label: str
    style: str
    interval: Sequence[float] | None = None

    @property
    def ends(self) -> tuple[float, ...]:
        """What an axis must reach to."""
        return (self.y, *(self.interval or ()))


@dataclass(frozen=True)
class Line:
    """A series; for `steps`, `xs` are the n + 1 edges of n bins `ys`."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str


@dataclass(frozen=True)
class Row:
    """A labelled difference with its interval, for `forest`."""

    label: str
    value: float
    style: str
    interval: Sequence[float] | None = None

    @property
    def ends(self) -> tuple[float, ...]:
        """What an axis must reach to."""
        return (self.value, *(self.interval or ()))


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """About `count` round numbers from the first at or below `low` to the first at or above `high`; `whole` ones for
    what is counted."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [power * factor for factor in (1, 2, 2.5, 5, 10) if not whole or (power * factor) % 1 == 0]
    step = next((step for step in steps if step >= rough * 0.999), 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 12) for index in range(first, last + 1)]


def dots(
    title: str,
    values: Sequence[Dot],
    x_label: str,
    y_label: str,
    *,
    include: Sequence[float] = (),
    whole_x: bool = True,
) -> Markup:
    """Values over depth, each with a whisker for its interval; the y axis reaches to every number in `include`."""
    ends = [end for dot in values for end in dot.ends]
    plot = _Plot.around([dot.x for dot in values], [*ends, *include], pad_x=True, whole_x=whole_x)
    marks = []
    for dot in values:
        x, y = plot.x(dot.x), plot.y(dot.y)
        whisker = ""
        if dot.interval:
            low, high = (plot.y(end) for end in dot.interval)
            whisker = f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
        shape = (
            f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
            if "attention" in dot.style
            else f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
        )
        tip = f"{dot.label}: {dot.y:.4g}{_span(dot.interval)}"
        marks.append(f'<g class="mark {escape(dot.style)}"><title>{escape(tip)}</title>{whisker}{shape}</g>')
    return plot.draw(title, "".join(marks), x_label, y_label)


def lines(
    title: str,
    series: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    include: Sequence[float] = (),
    log_y: bool = False,
) -> Markup:
    """Series over layers or tokens with a legend; the y axis reaches to every number in `include`; `log_y` needs values
    above 0."""
    xs, ys = [x for line in series for x in line.xs], [y for line in series for y in line.ys]
    plot = _Plot.around(xs, [*ys, *include], log_y=log_y, whole_x=True)
    marks = []
    for line in series:
        points = "L".join(f"{plot.x(x):.1f} {plot.y(y):.1f}" for x, y in zip(line.xs, line.ys, strict=True))
        dot = (
            f'<circle cx="{plot.x(line.xs[0]):.1f}" cy="{plot.y(line.ys[0]):.1f}" r="2.5"/>'
            if len(line.xs) == 1
            else ""
        )
        marks.append(_series(line, f"M{points}", dot))
    return plot.draw(title, "".join(marks), x_label, y_label, legend=series)


def steps(title: str, series: Sequence[Line], x_label: str, y_label: str, *, include: Sequence[float] = ()) -> Markup:
    """Histograms as outlines over each other, with a legend; the y axis reaches to every number in `include`."""
    xs = [x for line in series for x in line.xs]
    plot = _Plot.around(xs, [0.0, *include, *(y for line in series for y in line.ys)])
    marks = []
    for line in series:
        path = f"M{plot.x(line.xs[0]):.1f} {plot.y(0):.1f}"
        for left, right, y in zip(line.xs, line.xs[1:], line.ys, strict=False):
            path += f"L{plot.x(left):.1f} {plot.y(y):.1f}H{plot.x(right):.1f}"
        marks.append(_series(line, f"{path}V{plot.y(0):.1f}", "", fill=True))
    return plot.draw(title, "".join(marks), x_label, y_label, legend=series)


def forest(title: str, rows: Sequence[Row], x_label: str, *, include: Sequence[float] = ()) -> Markup:
    """Differences around 0, one row each, with intervals; the axis reaches to every number in `include`."""
    ends = [*include, *(end for row in rows for end in row.ends)]
    height = TOP + BOTTOM + ROW * len(rows)
    plot = _Plot.around([0.0, *ends], [0.0, 1.0], height=height, left=FOREST_LEFT, x_count=3)
    marks = [f'<path class="zero" d="M{plot.x(0):.1f} {TOP}V{height - BOTTOM}"/>']
    for index, row in enumerate(rows):
        y, x = TOP + ROW * index + ROW // 2, plot.x(row.value)
        whisker = ""
        if row.interval:
            low, high = (plot.x(end) for end in row.interval)
            whisker = f'<path class="whisker" d="M{low:.1f} {y}H{high:.1f}"/>'
        tip = f"{row.label}: {row.value:+.4g}{_span(row.interval)}"
        marks.append(
            f'<g class="mark {escape(row.style)}"><title>{escape(tip)}</title>'
            f"{_text('row', 0, y + 4, row.label)}{whisker}"
            f'<circle cx="{x:.1f}" cy="{y}" r="4.5"/></g>'
        )
    return plot.draw(title, "".join(marks), x_label, "", y_axis=False)


_ALONE = """
svg { --paper: #fff; --ink: #16191f; --soft: #5c6470; --rule: #dde1e7; --deltanet: #2563c9; --attention: #c2570c; --other: #0f766e }
@media (prefers-color-scheme: dark) {
  svg { --paper: #12151a; --ink: #e7eaef; --soft: #99a2af; --rule: #2f353f; --deltanet: #78a9ff; --attention: #ff9b57; --other: #4fd1c5 }
}
text { font: 11px system-ui, sans-serif; fill: var(--soft) } .title { font-weight: 600; fill: var(--ink) }
.paper { fill: var(--paper) } .grid, .axis { stroke: var(--rule) } .whisker { stroke: var(--c); stroke-width: 2; opacity: .55 }
.deltanet { --c: var(--deltanet) } .attention { --c: var(--attention) } .other { --c: var(--other) } .mark { fill: var(--c) }
"""  # noqa: E501


def sheet(figures: Sequence[Markup], columns: int) -> str:
    """Figures of `dots` as one SVG file with colours of its own, for a page without a style sheet: light or dark as its
    reader's."""
    cells = []
    for number, figure in enumerate(figures):
        x, y = number % columns * (WIDTH + 12), number // columns * (HEIGHT + 26)
        title = re.findall("<figcaption>(.*?)</figcaption>", figure)[0]
        drawn = re.findall("<svg.*</svg>", figure)[0].replace(
            'class="plot"', f'x="{x}" y="{y + 20}" width="{WIDTH}" height="{HEIGHT}"'
        )
        cells.append(f'<text class="title" x="{x + 2}" y="{y + 16}">{title}</text>{drawn}')
    width, height = columns * (WIDTH + 12) - 12, math.ceil(len(figures) / columns) * (HEIGHT + 26)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><style>{_ALONE}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/>{"".join(cells)}</svg>\n'
    )


def _series(line: Line, path: str, extra: str, *, fill: bool = False) -> str:
    area = f'<path class="area" d="{path}Z"/>' if fill else ""
    return (
        f'<g class="series {escape(line.style)}"><title>{escape(line.label)}</title>{area}'
        f'<path class="line" d="{path}"/>{extra}</g>'
    )


def _span(interval: Sequence[float] | None) -> str:
    return f" (95 % interval {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""


@dataclass(frozen=True)
class _Plot:
    """Scales and frame."""

    x_ticks: list[float]
    y_ticks: list[float]
    x_range: tuple[float, float]
    log_y: bool
    height: int
    left: int

    @classmethod
    def around(
        cls,
        xs: Sequence[float],
        ys: Sequence[float],
        *,
        pad_x: bool = False,
        log_y: bool = False,
        height: int = HEIGHT,
        left: int = LEFT,
        x_count: int = 6,
        whole_x: bool = False,
    ) -> _Plot:
        x_ticks = ticks(min(xs), max(xs), x_count, whole=whole_x)
        low, high = x_ticks[0], x_ticks[-1]
        if pad_x:
            low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
        low_y, high_y = min(ys), max(ys)
        y_ticks = [math.log10(y) for y in _log_ticks(low_y, high_y)] if log_y else ticks(low_y, high_y)
        if left == LEFT:  # numbers stand there
            longest = max(len(_number(10**tick if log_y else tick)) for tick in y_ticks)
            left = max(left, 10 + round(CHARACTER * longest))
        return cls(x_ticks, y_ticks, (low, high), log_y, height, left)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (WIDTH - self.left - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        position = math.log10(value) if self.log_y else value
        return self.height - BOTTOM - (position - low) / (high - low) * (self.height - TOP - BOTTOM)

    def draw(
        self,
        title: str,
        marks: str,
        x_label: str,
        y_label: str,
        *,
        legend: Sequence[Line] = (),
        y_axis: bool = True,
    ) -> Markup:
        floor = self.height - BOTTOM
        parts = [f'<path class="axis" d="M{self.left} {floor}H{WIDTH - RIGHT}"/>']
        for tick in self.y_ticks if y_axis else ():
            value = 10**tick if self.log_y else tick
            parts.append(f'<path class="grid" d="M{self.left} {self.y(value):.1f}H{WIDTH - RIGHT}"/>')
            parts.append(_text("tick", self.left - 6, self.y(value) + 3.5, _number(value), "end"))
        widths = [CHARACTER * len(_number(tick)) for tick in self.x_ticks]
        apart = self.x(self.x_ticks[1]) - self.x(self.x_ticks[0])
        for tick, width in list(zip(self.x_ticks, widths, strict=True))[:: math.ceil((max(widths) + 8) / apart)]:
            at = min(self.x(tick), WIDTH - width / 2)
            parts.append(_text("tick", at, floor + 16, _number(tick), "middle"))
        parts.append(_text("label", WIDTH - RIGHT, floor + 30, x_label, "end"))
        parts.append(_text("label", 2, TOP - 10, y_label))
        svg = (
            f'<svg class="plot" viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(title)}">'
            f"{''.join(parts)}{marks}</svg>"
        )
        return Markup(f"<figure><figcaption>{escape(title)}</figcaption>{_legend(legend)}{svg}</figure>")


def _text(style: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="{style}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>' if text else ""


def _legend(series: Sequence[Line]) -> str:
    entries = (
        f'<span class="series {escape(line.style)}"><svg class="sample" viewBox="0 0 22 8" aria-hidden="true">'
        f'<path class="line" d="M0 4H22"/></svg>{escape(line.label)}</span>'
        for line in series
    )
    return f'<div class="legend">{"".join(entries)}</div>' if series else ""


def _log_ticks(low: float, high: float) -> list[float]:
    """1-2-5 numbers around [low, high]."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    steps = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max(index for index, step in enumerate(steps) if step <= low * 1.0001)
    last = min((index for index, step in enumerate(steps) if step >= high * 0.9999), default=len(steps) - 1)
    return steps[first : max(last, first + 1) + 1]


def _number(value: float) -> str:
    """Short tick label: 0.25, 1.5M, -3."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.6g}"
