"""Of a sweep's report: what each task got from the model fused of all tasks, and what is missing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fusionlab.contracts import Row
from fusionlab.errors import name_list
from fusionlab.evaluation.rows import higher_is_better
from fusionlab.reporting.charts import Dot, DotChart, Panel
from fusionlab.reporting.page import Note, Part
from fusionlab.reporting.scores import groups
from fusionlab.reporting.words import count, method_name, rule_name


def by_task(name: str, sweep: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    """A chart a group of metrics: all tasks fused, a panel a method; nothing where no point fuses all of them.

    Args:
        name: what the charts' files begin with.
        sweep: the content of sweep.json.
        rows: of one protocol.
    """
    whole = [row for row in rows if set(row["fused_tasks"] or ()) == set(sweep["tasks"])]
    charts: list[Part] = []
    for number, group in enumerate(groups(whole)):
        panels = {}
        for method in dict.fromkeys(row["method"] for row in group.rows):
            of = [row for row in group.rows if row["method"] == method]
            panels[method_name(method)] = Panel(group.axis, _dots(of))
        axis = group.axis.label
        caption = f"All {count(len(sweep['tasks']), 'task')} fused, by task: {axis}, mean over seeds; whiskers are one "
        caption += "standard deviation over seeds"
        charts.append(DotChart(f"{name}-tasks{f'-{number}' if number else ''}", caption, panels))
    return charts


def _dots(rows: Sequence[Row]) -> dict[str, dict[str, Dot]]:
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault(rule_name(row["rule"]), {}).setdefault(row["task"], []).append(row["value"])
    return {rule: {task: _dot(f"{rule}, {task}", values) for task, values in of.items()} for rule, of in found.items()}


def _dot(name: str, values: Sequence[float]) -> Dot:
    mean = math.fsum(values) / len(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    over = f"± {spread:.3f} over {count(len(values), 'seed')}" if len(values) > 1 else "1 seed"
    return Dot(mean, f"{name}: {mean:.3f}; {over}", spread)


def missing_points(sweep: Mapping[str, Any], rows: Sequence[Row]) -> list[Part]:
    """Notes on what a reader might look for in vain: rules without points, tasks without shares, errors."""
    found: list[Part] = []
    lines = sweep["summary"]
    sizes = sorted({line["num_tasks"] for line in lines})
    gaps = []
    for protocol, method, rule in dict.fromkeys((each["protocol"], each["method"], each["rule"]) for each in lines):
        own = [each for each in lines if (each["protocol"], each["method"], each["rule"]) == (protocol, method, rule)]
        lacking = [size for size in sizes if size not in {each["num_tasks"] for each in own}]
        if lacking:
            which = ", ".join(map(str, lacking))
            gaps.append(f"{method_name(method)}, {rule_name(rule)} ({protocol}): no point for {which} fused tasks.")
    gaps += _fewer(lines)
    if gaps:
        gaps.append("Their lines stop there; nothing is drawn between points that are missing.")
    if gaps := _not_computed(sweep) + gaps:
        found.append(Note("Missing points", gaps, warns=True))
    if shares := _without_shares(sweep, rows):
        found.append(Note("Scores without shares", shares, warns=True))
    return found


def _not_computed(sweep: Mapping[str, Any]) -> list[str]:
    """How many points of each number of tasks there was no time for."""
    missing: dict[int, int] = {}
    for each in sweep.get("missing", ()):
        missing[each["num_tasks"]] = missing.get(each["num_tasks"], 0) + each["num_subsets"]
    told = [f"{count(number, 'point')} of {size} fused tasks: not computed yet." for size, number in missing.items()]
    return [*told, "The command of the sweep goes on with them."] if told else []


def _fewer(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines with fewer subsets or seeds than others of their number of tasks have."""
    told = []
    for field, noun in (("num_subsets", "subset"), ("num_seeds", "seed")):
        most: dict[int, int] = {}
        for line in lines:
            most[line["num_tasks"]] = max(line[field], most.get(line["num_tasks"], 0))
        told += [
            f"{method_name(line['method'])}, {rule_name(line['rule'])}, {count(line['num_tasks'], 'task')}: "
            f"{line[field]} of {count(most[line['num_tasks']], noun)}."
            for line in lines
            if line[field] < most[line["num_tasks"]]
        ]
    return list(dict.fromkeys(told))


def _without_shares(sweep: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    errors, unknown = (
        list(dict.fromkeys(row["task"] for row in rows if higher_is_better(row) is way)) for way in (False, None)
    )
    told = []
    if unknown:
        told.append(f"{name_list(unknown)}: the metric does not say what is better; there are no shares of it.")
    if errors and len(errors) < len(sweep["tasks"]):
        told.append(f"{name_list(errors)}: scored by an error, lower where better; in no mean with the others.")
    elif errors:
        told.append("All tasks are scored by errors, which are lower where better and have no shares.")
    for source, single in sweep["single_task"].items():
        none = [task for task, value in single["values"].items() if value <= 0 and task not in (*errors, *unknown)]
        if none:
            told.append(
                f"{source}: the single-task score of {name_list(none)} is zero or negative, so that shares of it, and "
                f"means of shares with it, do not exist."
            )
    return told
