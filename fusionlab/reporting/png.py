"""Charts as PNG beside Markdown and in run folders, by matplotlib."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fusionlab.files import written_whole
from fusionlab.reporting.charts import LIGHT, SHAPES, Chart, DotChart, Line, LineChart, Panel, extent, whole_ticks

_STYLES = ("-", "--", ":", "-.")


def png(chart: Chart) -> bytes:
    """A chart as PNG: panels beside one another, one legend."""
    return _lines(chart) if isinstance(chart, LineChart) else _dots(chart)


def _lines(chart: LineChart) -> bytes:
    figure, axes = _figure(len(chart.panels), 4.2, 3.6)
    styles = {label: number for number, label in enumerate(chart.labels())}
    handles: dict[str, Any] = {}
    every = [line for lines in chart.panels.values() for line in lines]
    for axis, (title, lines) in zip(axes, chart.panels.items(), strict=True):
        for line in lines:
            handles.setdefault(line.label, _line(axis, line, styles[line.label]))
        axis.set(title=title, xlabel=chart.x.label)
        x, y = extent(every if chart.shared else lines)
        if chart.x.whole:
            axis.set_xticks(whole_ticks((point.x for line in every for point in line.points), *x))
        margin = 0.06 * (y[1] - y[0])
        axis.set_ylim(y[0] - margin, y[1] + margin)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(chart.y.label)
    return _saved(figure, handles)


def _line(axis: Any, line: Line, number: int) -> Any:
    x, y = [point.x for point in line.points], [point.y for point in line.points]
    turn = 1 if line.dashed else number // len(SHAPES)
    look = {"color": LIGHT[number % len(LIGHT)], "marker": SHAPES[number % len(SHAPES)], "markersize": 4}
    if any(point.band for point in line.points):
        low, high = ([point.y + sign * point.band for point in line.points] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
    whiskers = [point.whisker for point in line.points]
    return axis.errorbar(
        x, y, yerr=whiskers if any(whiskers) else None, linestyle=_STYLES[turn % len(_STYLES)], linewidth=1.2, **look
    )


def _dots(chart: DotChart) -> bytes:
    tallest = max((_height(panel) for panel in chart.panels.values()), default=2.0)
    figure, axes = _figure(len(chart.panels), 5.2, tallest)
    styles = {label: number for number, label in enumerate(chart.labels())}
    handles: dict[str, Any] = {}
    for axis, (title, panel) in zip(axes, chart.panels.items(), strict=True):
        groups, count = panel.groups(), len(panel.dots)
        for place, (label, dots) in enumerate(panel.dots.items()):
            number = styles[label]
            y = [groups.index(group) + (place + 1) / (count + 1) - 0.5 for group in dots]
            values, whiskers = [dot.value for dot in dots.values()], [dot.whisker for dot in dots.values()]
            drawn = axis.errorbar(
                values, y, xerr=whiskers if any(whiskers) else None, linestyle="", markersize=4,
                color=LIGHT[number % len(LIGHT)], marker=SHAPES[number % len(SHAPES)],
            )  # fmt: skip
            handles.setdefault(label, drawn)
        if panel.zero:
            axis.axvline(0, color="0.4", linewidth=0.8)
        axis.set_yticks(range(len(groups)), groups)
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.set(title=title, xlabel=panel.axis.label)
        axis.grid(alpha=0.3, axis="x")
    return _saved(figure, handles)


def _height(panel: Panel) -> float:
    return 1.6 + len(panel.groups()) * max(0.26, 0.09 * len(panel.dots) + 0.1)


def _figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (width * max(1, panels), height)
    figure, axes = pyplot.subplots(1, max(1, panels), figsize=size, squeeze=False, layout="constrained")
    return figure, list(axes[0])


def _saved(figure: Any, handles: dict[str, Any]) -> bytes:
    from matplotlib import pyplot

    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    pyplot.close(figure)
    return content.getvalue()


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of pyplot as PNG, whole or not at all, and close it."""
    from matplotlib import pyplot

    with written_whole(path) as beside:
        figure.savefig(beside, dpi=120, format="png")
    pyplot.close(figure)
