"""Charts as SVG and PNG, by matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        label: in the legend; lines of one label have one colour.
        points: (x, y), in order.
        spread: half-width of the band around each point; no band where it is empty.
        style: matplotlib's line style.
    """

    label: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float] = ()
    style: str = "-"


@dataclass(frozen=True)
class Chart:
    """A drawn figure.

    Args:
        name: of its file.
        caption: what it shows, protocol and denominator included.
        svg: to be put into a page as it is.
        png: to be written beside Markdown.
    """

    name: str
    caption: str
    svg: str
    png: bytes


def line_chart(name: str, caption: str, panels: Mapping[str, Sequence[Line]], x_label: str, y_label: str) -> Chart:
    """One panel beside another, with shared axes and one legend."""
    figure, axes = _figure(len(panels))
    labels = list(dict.fromkeys(line.label for lines in panels.values() for line in lines))
    colours = {label: f"C{number % 10}" for number, label in enumerate(labels)}
    handles: dict[str, Any] = {}
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for line in lines:
            x, y = [point[0] for point in line.points], [point[1] for point in line.points]
            drawn = axis.plot(x, y, line.style, color=colours[line.label], marker=".", label=line.label)[0]
            handles.setdefault(line.label, drawn)
            if line.spread:
                low = [value - half for value, half in zip(y, line.spread, strict=True)]
                high = [value + half for value, half in zip(y, line.spread, strict=True)]
                axis.fill_between(x, low, high, color=colours[line.label], alpha=0.12, linewidth=0)
        axis.set(title=title, xlabel=x_label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(y_label)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return _chart(figure, name, caption)


def bar_chart(name: str, caption: str, groups: Mapping[str, Mapping[str, float]], y_label: str) -> Chart:
    """Grouped bars: ``groups[label][group]``."""
    figure, (axis,) = _figure(1, width=9.0)
    names = list(dict.fromkeys(group for values in groups.values() for group in values))
    width = 0.8 / max(1, len(groups))
    for number, (label, values) in enumerate(groups.items()):
        heights = [values.get(group, 0.0) for group in names]
        axis.bar([place + number * width for place in range(len(names))], heights, width, label=label)
    axis.set_xticks([place + 0.4 - width / 2 for place in range(len(names))], names, rotation=30, ha="right")
    axis.set_ylabel(y_label)
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return _chart(figure, name, caption)


def heat_maps(name: str, caption: str, panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Chart:
    """Square maps of −1..1 with their numbers, one panel beside another."""
    figure, axes = _figure(len(panels), height=4.2)
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        names = list(rows)
        values = [[rows[first].get(second, 0.0) for second in names] for first in names]
        axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = "white" if abs(value) > 0.6 else "black"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=colour)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize="x-small")
        axis.set_yticks(range(len(names)), names, fontsize="x-small")
        axis.set_title(title, fontsize="small")
    return _chart(figure, name, caption)


def _figure(panels: int, width: float = 4.2, height: float = 3.6) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, max(1, panels), figsize=(width * max(1, panels), height), sharey=panels > 1 and height < 4, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    return figure, list(axes[0])


def _chart(figure: Any, name: str, caption: str) -> Chart:
    from matplotlib import pyplot, rc_context

    svg, png = io.StringIO(), io.BytesIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=110)
    pyplot.close(figure)
    text = svg.getvalue()
    ids = re.sub(r"\W", "-", name)  # one page holds several drawings: their ids must differ
    text = re.sub(r'(id="|href="#|url\(#)', lambda match: f"{match[1]}{ids}-", text[text.index("<svg") :])
    return Chart(name, caption, text, png.getvalue())
