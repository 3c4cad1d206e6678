"""The report's comparison of two or more runs or sweeps: each with the first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusionlab.evaluation.rows import read_rows
from fusionlab.layout import RESULTS
from fusionlab.reporting.charts import Axis, Dot, DotChart, Line, LineChart, Panel, Point
from fusionlab.reporting.page import Cell, Note, Section, Table, file_name
from fusionlab.reporting.pairing import Compared, paired
from fusionlab.reporting.words import FLATTERS, PROTOCOLS, count, method_name, model_name

HOW = (
    "Differences are of scores of the same samples, paired by task, fused tasks and seed, over the fused tasks. The "
    "standard error is the largest of three: over tasks, over subsets, and over seeds, each of means over the other "
    "two. “Better” and “worse” stand only beyond twice that error, and for three pairs or more. With few tasks, subsets"
    " or seeds chance passes it often: one time in five with 3, in nine with 5, in thirteen with 10."
)


def comparisons(folders: Sequence[Path], names: Sequence[str]) -> list[Section]:
    """A section that says how, and one for each folder but the first, which it is compared with.

    Args:
        folders: of finished runs and sweeps, which have been read before; fewer than two give nothing.
        names: what they are called.
    """
    if len(folders) < 2:
        return []
    first, *others = folders
    base = read_rows(first / RESULTS)
    sections = [Section("Comparison", [f"Each is compared with {names[0]}. {HOW}"])]
    for number, (folder, name) in enumerate(zip(others, names[1:], strict=True), 1):
        found = paired(base, read_rows(folder / RESULTS))
        section = Section(f"{name} against {names[0]}", level=3)
        section.parts += _parts(found.compared, names[0], name, f"compared-{number}-{file_name(name)}")
        if found.told:
            section.parts.append(Note("What was paired", found.told, warns=not found.compared))
        sections.append(section)
    return sections


def _parts(compared: Sequence[Compared], first: str, second: str, name: str) -> list[Any]:
    parts: list[Any] = []
    kinds = dict.fromkeys((each.name.protocol, each.name.task_known, each.group.axis.label) for each in compared)
    for number, (protocol, told, axis) in enumerate(kinds):
        of = [
            each for each in compared if (each.name.protocol, each.name.task_known, each.group.axis.label) == (
                protocol, told, axis)
        ]  # fmt: skip
        what = f"{axis}; {PROTOCOLS.get(protocol, protocol)}{'; models that are told the task' if told else ''}"
        if protocol == "published":
            parts.append(Note("These numbers flatter", [FLATTERS], warns=True))
        parts.append(_table(of, what, first, second))
        over_sizes = len({each.name.num_tasks for each in of if each.name.num_tasks}) > 1
        drawn = _by_size(of, what, f"{name}-{number}") if over_sizes else _by_task(of, what, f"{name}-{number}")
        parts += [drawn]
    return parts


def label(each: Compared) -> str:
    """What a line is, in words."""
    words = model_name({"model": each.name.model, "rule": each.name.rule})
    return f"{method_name(each.name.method)}, {words}" if each.name.method else words


def _table(compared: Sequence[Compared], what: str, first: str, second: str) -> Table:
    body: list[list[Cell | str]] = []
    for each in compared:
        error = each.error()
        spread = f"± {error:.3f}" if error is not None else ""
        pairs = list(each.pairs.values())
        size = str(each.name.num_tasks or "–")
        means = [math.fsum(values) / len(pairs) for values in ([p.first for p in pairs], [p.second for p in pairs])]
        body.append(
            [label(each), size, *(f"{mean:.3f}" for mean in means),
             Cell(signed(each.difference), spread, each.difference), each.verdict(), str(len(pairs)), _counts(each)]
        )  # fmt: skip
    header = ["model", "fused tasks", first, second, "difference", f"{second} is", "pairs", "of"]
    caption = f"Mean {what}; difference ± paired standard error"
    return Table(caption, header, body, left=(5, 7))


def _counts(each: Compared) -> str:
    tasks, subsets, seeds = each.counts()
    return f"{count(tasks, 'task')}, {count(subsets, 'subset')}, {count(seeds, 'seed')}"


def signed(value: float) -> str:
    """A difference with its sign.

    Example:
        >>> signed(0.0123), signed(-0.5), signed(-0.0001)
        ('+0.012', '−0.500', '0.000')
    """
    return f"{value:+.3f}".replace("-", "−") if abs(value) >= 5e-4 else "0.000"


def _by_size(compared: Sequence[Compared], what: str, name: str) -> LineChart:
    lines: dict[str, dict[str, list[Point]]] = {}
    for each in (each for each in compared if each.name.num_tasks):
        error = each.error() or 0.0
        rule, size = model_name({"model": "fused", "rule": each.name.rule}), each.name.num_tasks or 0
        told = f"{rule}, {count(size, 'fused task')}: {signed(each.difference)} ± {error:.3f}, {_counts(each)}"
        panel = method_name(each.name.method) if each.name.method else "both methods"
        lines.setdefault(panel, {}).setdefault(rule, []).append(Point(size, each.difference, told, whisker=error))
    panels = {
        title: [Line(rule, sorted(points, key=lambda point: point.x)) for rule, points in of.items()]
        for title, of in lines.items()
    }
    caption = f"Difference by number of fused tasks: {what}. Whiskers are one standard error"
    return LineChart(name, caption, panels, Axis("number of fused tasks", whole=True), Axis("difference"))


def _by_task(compared: Sequence[Compared], what: str, name: str) -> DotChart:
    dots: dict[str, dict[str, Dot]] = {}
    for each in compared:
        for task in dict.fromkeys(unit[0] for unit in each.pairs):
            of = [pair for unit, pair in each.pairs.items() if unit[0] == task]
            difference = math.fsum(pair.difference for pair in of) / len(of)
            error = _task_error([pair.difference for pair in of], [pair.error for pair in of])
            spread = f" ± {error:.3f}" if error else ""
            told = f"{label(each)}, {task}: {signed(difference)}{spread}, {count(len(of), 'pair')}"
            dots.setdefault(label(each), {})[task] = Dot(difference, told, error or 0.0)
    caption = (
        f"Difference by task: {what}. Whiskers are one standard error, by samples where a task has one pair, which "
        f"takes the two scores for independent and is rather too long"
    )
    axis = Axis(f"difference in {compared[0].group.axis.label}")
    return DotChart(name, caption, {compared[0].group.title: Panel(axis, dots, zero=True)})


def _task_error(differences: Sequence[float], errors: Sequence[float | None]) -> float | None:
    if len(differences) > 1:
        return statistics.stdev(differences) / math.sqrt(len(differences))
    return errors[0]
