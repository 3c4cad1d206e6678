"""What is drawn: lines over a quantity, and dots by task; how they look is told in ``svg`` and ``png``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

LIGHT = ("#3754cb", "#ab0a07", "#209e95", "#6c236e", "#bf7303", "#080826", "#9774fd", "#560601")
DARK = ("#26d2ff", "#d16a13", "#07a077", "#fb9dbd", "#d8e196", "#fbfbfc", "#9a6ef2", "#fb5fab")
"""Colours of series, in order, on a light and on a dark page: told apart by people who do not see red, green or blue
as others do, and 3:1 or more against the page. Series also differ in the shape of their marks and, past the eighth, in
their dashes, so that none is known by its colour alone."""
SHAPES = "osD^vPXp"
DASHES = ("", "6 3", "2 2", "8 3 2 3")


@dataclass(frozen=True)
class Axis:
    """An axis.

    Args:
        label: what it shows, with its unit.
        whole: values are counts, whose ticks are whole numbers.
    """

    label: str
    whole: bool = False


@dataclass(frozen=True)
class Point:
    """A point of a line.

    Args:
        x: where it stands.
        y: its value.
        told: what a pointer or a key on it says.
        band: half-width of the line's band there.
        whisker: half-length of the point's whisker.
    """

    x: float
    y: float
    told: str
    band: float = 0.0
    whisker: float = 0.0


@dataclass(frozen=True)
class Line:
    """One line; lines of one label look alike in all panels."""

    label: str
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """A value with its whisker's half-length and what a pointer or a key on it says."""

    value: float
    told: str
    whisker: float = 0.0


@dataclass(frozen=True)
class LineChart:
    """Lines over a quantity, one panel beside another, with shared axes and one legend.

    Args:
        name: of its file.
        caption: what it shows, protocol and denominator included.
        panels: lines by title.
        x: the axis across.
        y: the axis up.
        shared: whether all panels have one range of values.
    """

    name: str
    caption: str
    panels: Mapping[str, Sequence[Line]]
    x: Axis
    y: Axis
    shared: bool = True

    def labels(self) -> list[str]:
        """The names of its lines, in order."""
        return list(dict.fromkeys(line.label for lines in self.panels.values() for line in lines))


@dataclass(frozen=True)
class Panel:
    """Dots by what they belong to and by task.

    Args:
        axis: of the values.
        dots: by label, then by task.
        zero: whether a line marks zero.
    """

    axis: Axis
    dots: Mapping[str, Mapping[str, Dot]]
    zero: bool = False

    def groups(self) -> list[str]:
        """The tasks, in order."""
        return list(dict.fromkeys(group for dots in self.dots.values() for group in dots))


@dataclass(frozen=True)
class DotChart:
    """Values by task, each panel with an axis of its own, so that no two units share one.

    Args:
        name: of its file.
        caption: what it shows.
        panels: by title.
    """

    name: str
    caption: str
    panels: Mapping[str, Panel] = field(default_factory=dict)

    def labels(self) -> list[str]:
        """The names of its series, in order."""
        return list(dict.fromkeys(label for panel in self.panels.values() for label in panel.dots))


Chart = LineChart | DotChart


def range_of(values: Iterable[float]) -> tuple[float, float]:
    """Lowest and highest value that is finite, apart by something; 0 to 1 where there is none."""
    found = [value for value in values if math.isfinite(value)]
    low, high = min(found, default=0.0), max(found, default=1.0)
    apart = max(0.5, 1e-3 * abs(low))
    return (low, high) if high > low else (low - apart, high + apart)


def extent(lines: Iterable[Line]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The ranges across and up that lines take with their bands and whiskers."""
    points = [point for line in lines for point in line.points]
    reach = [(point.y, max(point.band, point.whisker)) for point in points]
    return range_of(point.x for point in points), range_of(y + s * half for y, half in reach for s in (-1, 1))


def ticks(low: float, high: float, whole: bool = False, about: int = 6) -> list[float]:
    """Round values between two bounds, both included; whole ones where values are counts.

    Example:
        >>> ticks(2, 6, whole=True), ticks(2, 3, whole=True)
        ([2, 3, 4, 5, 6], [2, 3])
        >>> ticks(0.31, 0.62)
        [0.35, 0.4, 0.45, 0.5, 0.55, 0.6]
    """
    rough = (high - low) / (about - 1)
    rough = max(1.0, rough) if whole else 0.75 * rough
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step) if whole else float(f"{number * step:.12g}") for number in range(first, last + 1)]


def whole_ticks(values: Iterable[float], low: float, high: float, at_most: int = 8) -> list[float]:
    """Ticks of an axis of counts: the counts that there are where they are few, else :func:`ticks`.

    Example:
        >>> whole_ticks([2, 4, 8, 4], 2, 8), whole_ticks(range(1, 98), 1, 97)
        ([2, 4, 8], [20, 40, 60, 80])
    """
    found = sorted(set(values))
    return found if len(found) <= at_most else ticks(low, high, whole=True)


def tick_text(value: float, all_ticks: Sequence[float]) -> str:
    """A tick's number with the decimals that all of them need, thousands apart.

    Example:
        >>> [tick_text(value, [0.4, 0.45]) for value in (0.4, 0.45)], tick_text(2, [2, 3]), tick_text(1e4, [0, 1e4])
        (['0.40', '0.45'], '2', '10,000')
    """
    if 0 < max(map(abs, all_ticks), default=0.0) < 1e-5:
        return f"{value:.3g}".replace("-", "−")
    texts = [f"{abs(each):.6f}".rstrip("0").rpartition(".")[2] for each in all_ticks]
    return f"{value:,.{max(map(len, texts), default=0)}f}".replace("-", "−")
