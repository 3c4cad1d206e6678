"""Charts as SVG in the page's own colours, where every point says its numbers to the pointer and to the keyboard."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fusionlab.reporting.charts import (
    DASHES,
    SHAPES,
    Axis,
    DotChart,
    Line,
    LineChart,
    Panel,
    extent,
    range_of,
    tick_text,
    ticks,
    whole_ticks,
)

WIDTH, HEIGHT = 360, 248  # of a panel of lines; one of dots is as high as its tasks need
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40
MARKS = {
    "o": "M-3.6,0a3.6,3.6 0 1,0 7.2,0a3.6,3.6 0 1,0 -7.2,0",
    "s": "M-3.2,-3.2h6.4v6.4h-6.4z",
    "D": "M0,-4.6L4.6,0L0,4.6L-4.6,0z",
    "^": "M0,-4.4L4.3,3.4L-4.3,3.4z",
    "v": "M0,4.4L4.3,-3.4L-4.3,-3.4z",
    "P": "M-1.5,-4.2h3v2.7h2.7v3h-2.7v2.7h-3v-2.7h-2.7v-3h2.7z",
    "X": "M-3.9,-2L-2,-3.9L0,-1.9L2,-3.9L3.9,-2L1.9,0L3.9,2L2,3.9L0,1.9L-2,3.9L-3.9,2L-1.9,0z",
    "p": "M0,-4.4L4.2,-1.4L2.6,3.6L-2.6,3.6L-4.2,-1.4z",
}


@dataclass(frozen=True)
class Frame:
    """Where values lie in a panel.

    Args:
        x: lowest and highest value across.
        y: lowest and highest value up.
        height: of the whole panel.
        left: space for the labels of the axis up.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    height: float = HEIGHT
    left: float = LEFT

    def across(self, value: float) -> float:
        """The place of a value across."""
        low, high = self.x
        return self.left + (value - low) / (high - low) * (WIDTH - self.left - RIGHT)

    def up(self, value: float) -> float:
        """The place of a value up."""
        low, high = self.y
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - BOTTOM - TOP)


def line_panels(chart: LineChart) -> dict[str, str]:
    """Each panel's drawing by its title."""
    styles = {label: number for number, label in enumerate(chart.labels())}
    every = [line for lines in chart.panels.values() for line in lines]
    drawn = {}
    for title, lines in chart.panels.items():
        x, y = extent(every if chart.shared else lines)
        frame = Frame(_apart(x, 0.04), _apart(y, 0.06))
        across = ticks(*frame.x)
        if chart.x.whole:
            across = whole_ticks((point.x for line in every for point in line.points), *x)
        parts = [*_grid(frame, chart.x, across, ticks(*frame.y, about=7))]
        placed = [(line, styles[line.label], _aside(number, lines)) for number, line in enumerate(lines)]
        parts += [part for each in placed for part in _under(frame, *each)]
        parts += [part for each in placed for part in _points(frame, *each)]
        drawn[title] = _svg(f"{title}: {chart.y.label} over {chart.x.label}", frame.height, parts)
    return drawn


def dot_panels(chart: DotChart) -> dict[str, str]:
    """Each panel's drawing by its title: a row a task, a mark a series."""
    styles = {label: number for number, label in enumerate(chart.labels())}
    return {title: _dots(title, panel, styles) for title, panel in chart.panels.items()}


def key(number: int, dashed: bool = False) -> str:
    """The mark of a legend: what the series of this number look like; hidden from readers, who are told its name."""
    line = f'<path class="line{_dashed(number, dashed)}" d="M1,7H27"/>'
    mark = f'<path class="mark" transform="translate(14,7)" d="{MARKS[SHAPES[number % len(SHAPES)]]}"/>'
    return f'<svg class="key {_colour(number)}" viewBox="0 0 28 14" aria-hidden="true">{line}{mark}</svg>'


def _dots(title: str, panel: Panel, styles: dict[str, int]) -> str:
    groups, labels = panel.groups(), list(panel.dots)
    step = max(26, 9 * len(labels) + 10)
    ends = [dot.value + sign * dot.whisker for dots in panel.dots.values() for dot in dots.values() for sign in (-1, 1)]
    low, high = range_of([*ends, 0.0] if panel.zero else ends)
    left = min(130, 14 + 6.4 * max(map(len, groups), default=0))
    frame = Frame(_apart((low, high), 0.05), (0.0, float(len(groups))), TOP + BOTTOM + step * len(groups), left)
    parts = [*_grid(frame, panel.axis, ticks(*frame.x), [])]
    if panel.zero:
        parts.append(f'<path class="zero" d="M{frame.across(0):.1f},{TOP}V{frame.height - BOTTOM}"/>')
    for row, group in enumerate(groups):
        top = TOP + row * step
        if row:
            parts.append(f'<path class="grid" d="M{frame.left:.0f},{top}H{WIDTH - RIGHT}"/>')
        shown = group if len(group) <= 18 else group[:17] + "…"
        name = f"<title>{html.escape(group)}</title>" if shown != group else ""
        text = f"{html.escape(shown)}{name}"
        parts.append(
            f'<text class="label" x="{left - 8:.0f}" y="{top + step / 2 + 4:.1f}" text-anchor="end">{text}</text>'
        )
        for place, label in enumerate(labels):
            if (dot := panel.dots[label].get(group)) is not None:
                y = top + step * (place + 1) / (len(labels) + 1)
                bar = _whisker(frame.across(dot.value - dot.whisker), y, frame.across(dot.value + dot.whisker), y)
                mark = _mark(frame.across(dot.value), y, styles[label], dot.told, bar if dot.whisker else "")
                parts.append(mark)
    return _svg(f"{title}: {panel.axis.label}", frame.height, parts)


def _aside(number: int, lines: Sequence[Line]) -> float:
    """How far a line's points stand aside, so that the whiskers of several do not cover one another."""
    if not any(point.whisker for line in lines for point in line.points):
        return 0.0
    return min(2.4, 14 / len(lines)) * (number - (len(lines) - 1) / 2)


def _under(frame: Frame, line: Line, number: int, aside: float) -> Iterator[str]:
    """The band and the line itself."""
    colour = _colour(number)
    if any(point.band for point in line.points):
        above = [(frame.across(point.x) + aside, frame.up(point.y + point.band)) for point in line.points]
        below = [(frame.across(point.x) + aside, frame.up(point.y - point.band)) for point in reversed(line.points)]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in above + below)
        yield f'<polygon class="band {colour}" data-s="{number}" points="{corners}"/>'
    corners = " ".join(f"{frame.across(point.x) + aside:.1f},{frame.up(point.y):.1f}" for point in line.points)
    yield f'<polyline class="line {colour}{_dashed(number, line.dashed)}" data-s="{number}" points="{corners}"/>'


def _points(frame: Frame, line: Line, number: int, aside: float) -> Iterator[str]:
    for point in line.points:
        x, y = frame.across(point.x) + aside, frame.up(point.y)
        low, high = frame.up(point.y - point.whisker), frame.up(point.y + point.whisker)
        yield _mark(x, y, number, point.told, _whisker(x, low, x, high) if point.whisker else "")


def _mark(x: float, y: float, number: int, told: str, more: str = "") -> str:
    """A mark that a pointer finds on a disc around it, and a key by being next."""
    text = html.escape(told)
    mark = f'<path class="mark" transform="translate({x:.1f},{y:.1f})" d="{MARKS[SHAPES[number % len(SHAPES)]]}"/>'
    names = f'class="point {_colour(number)}" data-s="{number}"'
    return (
        f'<g {names} tabindex="-1" role="img" aria-label="{text}"><title>{text}</title>'
        f'{more}{mark}<circle class="reach" cx="{x:.1f}" cy="{y:.1f}" r="8"/></g>'
    )


def _whisker(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="whisker" d="M{x1:.1f},{y1:.1f}L{x2:.1f},{y2:.1f}"/>'


def _grid(frame: Frame, x: Axis, across: Sequence[float], up: Sequence[float]) -> Iterator[str]:
    """Lines and numbers of both axes, and what the one across shows."""
    bottom = frame.height - BOTTOM
    for value in across:
        place = frame.across(value)
        yield f'<path class="grid" d="M{place:.1f},{TOP}V{bottom}"/>'
        yield f'<text x="{place:.1f}" y="{bottom + 15}" text-anchor="middle">{tick_text(value, across)}</text>'
    for value in up:
        place = frame.up(value)
        yield f'<path class="grid" d="M{frame.left},{place:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{frame.left - 6}" y="{place + 4:.1f}" text-anchor="end">{tick_text(value, up)}</text>'
    yield f'<path class="axis" d="M{frame.left:.0f},{bottom}H{WIDTH - RIGHT}"/>'
    middle = (frame.left + WIDTH - RIGHT) / 2
    at = f'x="{middle:.0f}" y="{frame.height - 6}" text-anchor="middle"'
    yield f'<text class="label" {at}>{html.escape(x.label)}</text>'


def _svg(label: str, height: float, parts: Sequence[str]) -> str:
    """The drawing; its first point can be reached by the tabulator, the others from there."""
    inside = "".join(parts).replace('tabindex="-1"', 'tabindex="0"', 1)
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="group" aria-label="{html.escape(label)}">'
    return f"{head}{inside}</svg>"


def _apart(bounds: tuple[float, float], share: float) -> tuple[float, float]:
    low, high = bounds
    return low - share * (high - low), high + share * (high - low)


def _colour(number: int) -> str:
    return f"s{number % len(SHAPES)}"


def _dashed(number: int, dashed: bool) -> str:
    turn = 1 if dashed else number // len(SHAPES)
    return f" d{turn % len(DASHES)}" if turn else ""
