"""Learning curves of a run, from the ``metrics.csv`` of Lightning's CSV logger in its folder."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

from fusionlab.layout import LOGGED
from fusionlab.reporting.charts import Axis, Line, LineChart, Point
from fusionlab.reporting.page import Note
from fusionlab.reporting.words import metric_name

MOST_POINTS = 60  # of a line: more are averaged by steps, which is said
STAGES = {"train": "training", "validation": "validation", "test": "test"}
Series = dict[str, list[tuple[int, float]]]


def learning_curves(folder: Path, name: str) -> list[LineChart | Note]:
    """Charts of what was logged by step: one a metric, a panel a stage, a line a task.

    Args:
        folder: of the run; loggers write below it.
        name: what the charts' files begin with.

    Returns:
        Nothing where no logger wrote there; a note where what it wrote has no step twice.
    """
    files = sorted(folder.rglob(LOGGED))
    found: list[LineChart | Note] = []
    for number, path in enumerate(files, 1):
        logged = read_metrics(path)
        end = f"-{number}" if len(files) > 1 else ""
        of = f" ({path.parent.relative_to(folder)})" if len(files) > 1 else ""
        charts = [_chart(f"{name}-{metric}{end}", metric, of, stages) for metric, stages in logged.items()]
        drawn = [each for each in charts if each is not None]
        short = f"{path.relative_to(folder)} has fewer than two steps of every value; log more often to see a curve."
        found += drawn or [Note("No learning curve", [short])]
    return found


def read_metrics(path: Path) -> dict[str, dict[str, Series]]:
    """What was logged, by metric, stage and task: (step, value), finite ones, in order.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "log.csv"
        >>> _ = file.write_text("epoch,step,train/a/loss,lr-Adam\\n0,1,0.5,0.1\\n0,3,nan,0.1\\n0,5,0.25,\\n")
        >>> read_metrics(file)
        {'loss': {'train': {'a': [(1, 0.5), (5, 0.25)]}}}
    """
    found: dict[str, dict[str, Series]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            for key, text in line.items():
                parts = (key or "").split("/")
                if len(parts) != 3 or parts[0] not in STAGES or not text or not line.get("step"):
                    continue
                stage, task, metric = parts
                value = float(text)
                if math.isfinite(value):
                    series = found.setdefault(metric, {}).setdefault(stage, {})
                    series.setdefault(task, []).append((int(float(line["step"])), value))
    return found


def _chart(name: str, metric: str, of: str, stages: Mapping[str, Series]) -> LineChart | None:
    panels: dict[str, list[Line]] = {}
    joined = 1
    for stage, series in stages.items():
        for task, points in series.items():
            width = math.ceil(len(points) / MOST_POINTS)
            joined = max(joined, width)
            if len(points) > 1:
                panels.setdefault(STAGES[stage], []).append(_line(task, metric, points, width))
    if not panels:
        return None
    words = metric_name(metric)
    mean = f"; each point is the mean of up to {joined} logged steps" if joined > 1 else ""
    caption = f"{words[:1].upper()}{words[1:]} by optimizer step, a line a task{of}{mean}"
    return LineChart(name, caption, panels, Axis("step", whole=True), Axis(words), shared=False)


def _line(task: str, metric: str, points: list[tuple[int, float]], width: int) -> Line:
    drawn = []
    for first in range(0, len(points), width):
        part = points[first : first + width]
        value = math.fsum(each for _, each in part) / len(part)
        step = part[-1][0]
        told = f"{task}, {metric_name(metric)} {value:.4g} at step {step:,}"
        drawn.append(Point(step, value, told))
    return Line(task, drawn)
