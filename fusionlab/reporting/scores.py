"""Scores of a run by task and model, each metric on an axis of its own unless values are alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from fusionlab.contracts import Row
from fusionlab.evaluation.rows import higher_is_better, is_score, primary_rows, shown_rows
from fusionlab.files import written_whole
from fusionlab.reporting.charts import Axis, Dot, DotChart, Panel
from fusionlab.reporting.png import png
from fusionlab.reporting.words import metric_name, model_name

_WAYS = {True: " (higher is better)", False: " (lower is better)", None: ""}
MEAN = "(mean)"  # no task's name begins so


@dataclass(frozen=True)
class Group:
    """Rows that may share an axis and a mean.

    Args:
        title: the metrics' names.
        axis: what an axis with them says.
        rows: one a model, task and metric.
        higher: whether more is better; None where that is not known.
        averaged: tasks and metrics that a mean is of: each task's first metric, where it is of this group and says what
            is better.
    """

    title: str
    axis: Axis
    rows: Sequence[Row]
    higher: bool | None
    averaged: Set[tuple[str, str]]


def own_rows(rows: Iterable[Row]) -> list[Row]:
    """What :func:`shown_rows` has, without counts of faults and what lm-eval scored."""
    return [row for row in shown_rows(rows) if is_score(row)]


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows by what may stand on one axis: scores of at most 1 together, every other metric by itself.

    Errors are never beside scores, and never beside errors of another metric, whose unit is another.
    """
    rows = own_rows(rows)
    averaged = {(row["task"], row["metric"]) for row in primary_rows(rows) if higher_is_better(row) is not None}
    large = {row["metric"] for row in rows if abs(row["value"]) > 1}
    found: dict[tuple[bool | None, str], list[Row]] = {}
    for row in rows:
        higher = higher_is_better(row)
        alone = row["metric"] if not higher or row["metric"] in large else ""
        found.setdefault((higher, alone), []).append(row)
    return [_group(of, way, averaged) for way in _WAYS for (higher, _), of in found.items() if higher is way]


def _group(rows: Sequence[Row], higher: bool | None, averaged: Set[tuple[str, str]]) -> Group:
    names = ", ".join(metric_name(metric) for metric in dict.fromkeys(row["metric"] for row in rows))
    return Group(names[:1].upper() + names[1:], Axis(names + _WAYS[higher]), rows, higher, averaged)


def column(row: Row, rows: Sequence[Row]) -> str:
    """A row's task, with its metric where the task has several."""
    several = len({each["metric"] for each in rows if each["task"] == row["task"]}) > 1
    return f"{row['task']} ({metric_name(row['metric'])})" if several else str(row["task"])


def panel(group: Group) -> Panel:
    """Dots by model and task with the standard error by samples, the mean over tasks last."""
    dots: dict[str, dict[str, Dot]] = {}
    for row in group.rows:
        error = row.get("stderr")
        spread = f" ± {error:.3f} (standard error)" if error else ""
        told = f"{model_name(row)}, {row['task']}: {row['value']:.3f}{spread}, {row['num_samples']:,} samples"
        dots.setdefault(model_name(row), {})[column(row, group.rows)] = Dot(row["value"], told, error or 0.0)
    for name, mean in means(group).items():
        spread = f" ± {mean.error:.3f} (standard error by samples)" if mean.error else ""
        told = f"{name}, mean over {mean.count} tasks: {mean.value:.3f}{spread}"
        if mean.count > 1:
            dots[name][MEAN] = Dot(mean.value, told, mean.error or 0.0)
    return Panel(group.axis, dots)


@dataclass(frozen=True)
class Mean:
    """A mean over tasks with its standard error by samples; None where a task's is not known."""

    value: float
    error: float | None
    count: int


def means(group: Group) -> dict[str, Mean]:
    """By model, the mean over its tasks of each task's first metric; where a task is missing there is none."""
    primary = [row for row in group.rows if (row["task"], row["metric"]) in group.averaged]
    tasks = {row["task"] for row in primary}
    found: dict[str, dict[str, Row]] = {}
    for row in primary:
        found.setdefault(model_name(row), {})[row["task"]] = row
    return {name: _mean(list(of.values())) for name, of in found.items() if set(of) == tasks}


def _mean(rows: Sequence[Row]) -> Mean:
    errors = [row.get("stderr") for row in rows]
    known = None if None in errors else math.sqrt(math.fsum(float(each or 0) ** 2 for each in errors)) / len(rows)
    return Mean(math.fsum(row["value"] for row in rows) / len(rows), known, len(rows))


def chart(name: str, caption: str, rows: Iterable[Row]) -> DotChart:
    """All groups of a run's rows, a panel each."""
    panels: Mapping[str, Panel] = {group.title: panel(group) for group in groups(rows)}
    return DotChart(name, caption, panels)


def plot_scores(rows: Sequence[Row], path: Path) -> None:
    """Dots by task and model, errors on an axis of their own; written as PNG. Without models that are told the task."""
    with written_whole(path) as beside:
        beside.write_bytes(png(chart(path.stem, "", [row for row in rows if not row.get("task_known")])))
