"""The parts of a sweep's report: a section a protocol, over the fused tasks and over all, and what lies behind both."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusionlab.contracts import Row
from fusionlab.evaluation.rows import higher_is_better, read_rows
from fusionlab.foreign import read_json
from fusionlab.layout import RESULTS, SWEEP
from fusionlab.reporting.charts import Axis, Line, LineChart, Point
from fusionlab.reporting.page import Cell, Note, Section, Table, file_name
from fusionlab.reporting.published import METHOD_OF_MODE, RULE_OF_METHOD, PublishedSummary
from fusionlab.reporting.sweep_costs import background
from fusionlab.reporting.sweep_tasks import by_task, missing_points
from fusionlab.reporting.words import FLATTERS, OVER, PROTOCOLS, count, criterion, method_name, rule_name

Lines = Sequence[Mapping[str, Any]]
Published = Sequence[PublishedSummary]
_FUSED = Axis("number of fused tasks", whole=True)
_KINDS = ("own", "full", "abs")
_PARTS = {"sub": "Over the fused tasks", "all": "Over all tasks"}
_TOLD = "Models that are told each input's task, not compared with the others. "
_SPREADS = (
    "Bands are one standard deviation over task subsets, whiskers one over seeds (of the means over the subsets that "
    "all seeds have); where there is one subset or one seed there is none."
)
_DASHED = (
    "Dashed: the published averages of arXiv 2310.04742 for the same method and rule, another backbone and other "
    "tasks, coefficients chosen on the reported scores."
)


def of_sweep(folder: Path, published: Published, title: str) -> list[Section]:
    """The sections of a sweep's folder."""
    sweep, name = read_json(folder / SWEEP), file_name(title)
    rows = read_rows(folder / RESULTS)
    first = Section(f"Sweep {title}", facts=_facts(sweep), parts=missing_points(sweep, rows))
    sections = [first]
    for protocol in dict.fromkeys(line["protocol"] for line in sweep["summary"]):
        lines = [line for line in sweep["summary"] if line["protocol"] == protocol]
        of_protocol = [row for row in rows if row["protocol"] == protocol]
        for told, (part, over) in itertools.product((False, True), _PARTS.items()):
            kept = [line for line in lines if line.get("task_known", False) == told]
            label = f"{name}-{protocol}-task-known" if told else f"{name}-{protocol}"
            section = _section(label, kept, part, () if told else published, _only_errors(rows))
            section.title = f"{_TOLD if told else ''}{over}: {PROTOCOLS[protocol]}"
            if protocol == "published" and kept:
                section.parts.insert(0, Note("These numbers flatter", [FLATTERS], warns=True))
            widest = "all" if any("abs_all" in line["mean"] for line in kept) else "sub"
            if part == widest and kept:
                section.parts += by_task(label, sweep, [row for row in of_protocol if bool(row["task_known"]) == told])
            if section.parts:
                sections.append(section)
    return [*sections, *background(sweep, rows, name)]


def _facts(sweep: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = sweep["summary"]
    seeds = dict.fromkeys(str(each["seed"]) for each in sweep["single_task"].values())
    subsets: dict[int, int] = {}
    for line in lines:
        subsets[line["num_tasks"]] = max(line["num_subsets"], subsets.get(line["num_tasks"], 0))
    sizes = ", ".join(f"{subsets[size]} of {count(size, 'task')}" for size in sorted(subsets))
    methods = ", ".join(dict.fromkeys(method_name(line["method"]) for line in lines))
    return [
        ("base model", str(sweep["backbone"])),
        (count(len(sweep["tasks"]), "task"), ", ".join(sweep["tasks"])),
        ("fine-tuning methods", methods),
        ("fusion rules", ", ".join(dict.fromkeys(rule_name(line["rule"]) for line in lines))),
        ("task subsets", sizes),
        (count(len(seeds), "seed"), ", ".join(seeds)),
    ]


def _only_errors(rows: Sequence[Row]) -> bool:
    ways = {higher_is_better(row) for row in rows}
    return False in ways and True not in ways


def _section(name: str, lines: Lines, part: str, published: Published, errors_only: bool) -> Section:
    section = Section("", [f"{OVER[part]} {_SPREADS}"], level=3)
    for kind in _KINDS:
        key = f"{kind}_{part}"
        having = [line for line in lines if key in line["mean"]]
        if having:
            section.parts.append(_curves(f"{name}-{key}", having, key, published, errors_only))
            section.parts.append(_table(having, key, errors_only))
    if published:
        section.text.append(_DASHED)
    return section


def _curves(name: str, lines: Lines, key: str, published: Published, errors_only: bool) -> LineChart:
    panels: dict[str, list[Line]] = {}
    for method in dict.fromkeys(line["method"] for line in lines):
        of = [line for line in lines if line["method"] == method]
        drawn = [_line(of, rule, key) for rule in dict.fromkeys(line["rule"] for line in of)]
        panels[method_name(method)] = [*drawn, *_published_lines(published, method, key)]
    words = criterion(key, errors_only)
    caption = f"{words.title}, by number of fused tasks. {words.explained}"
    return LineChart(name, caption, panels, _FUSED, Axis(words.axis))


def _line(lines: Lines, rule: str, key: str) -> Line:
    points = []
    for line in sorted((line for line in lines if line["rule"] == rule), key=lambda line: line["num_tasks"]):
        mean, subsets, seeds = line["mean"][key], line["std_over_subsets"][key], line["std_over_seeds"][key]
        told = [f"{rule_name(rule)}, {count(line['num_tasks'], 'fused task')}: {mean:.3f}"]
        for number, noun, spread in ((line["num_subsets"], "subset", subsets), (line["num_seeds"], "seed", seeds)):
            known = number > 1 and spread is not None
            told.append(f"± {spread:.3f} over {count(number, noun)}" if known else count(number, noun))
        told += _uneven(line)
        points.append(Point(line["num_tasks"], mean, "; ".join(told), subsets or 0.0, seeds or 0.0))
    return Line(rule_name(rule), points)


def _uneven(line: Mapping[str, Any]) -> list[str]:
    """How many points a mean is over, where not every seed has every subset."""
    points = line.get("num_points", 0)
    return [count(points, "point")] if 0 < points < line["num_subsets"] * line["num_seeds"] else []


def _published_lines(published: Published, method: str, key: str) -> list[Line]:
    found: dict[str, list[Point]] = {}
    for item in published:
        wanted = item.selection in ("none", "per_subset_best:own_all")
        if wanted and METHOD_OF_MODE[item.mode] == method and key in item.summary.mean:
            label = f"published {rule_name(RULE_OF_METHOD[item.method])} ({item.model})"
            mean, subsets = item.summary.mean[key], count(item.summary.num_subsets, "subset")
            told = f"{label}, {count(item.num_tasks, 'fused task')}: {mean:.3f}; {subsets}"
            found.setdefault(label, []).append(Point(item.num_tasks, mean, told))
    return [Line(label, sorted(of, key=lambda point: point.x), dashed=True) for label, of in found.items()]


def _table(lines: Lines, key: str, errors_only: bool) -> Table:
    sizes = sorted({line["num_tasks"] for line in lines})
    cells: dict[tuple[str, str], dict[int, Cell]] = {}
    for line in lines:
        spreads = []
        if line["num_subsets"] > 1 and line["std_over_subsets"][key] is not None:
            spreads.append(f"± {line['std_over_subsets'][key]:.3f}")
        if line["num_seeds"] > 1 and line["std_over_seeds"][key] is not None:
            spreads.append(f"seeds ± {line['std_over_seeds'][key]:.3f}")
        spreads += _uneven(line)
        cell = Cell(f"{line['mean'][key]:.3f}", ", ".join(spreads), line["mean"][key])
        cells.setdefault((line["method"], line["rule"]), {})[line["num_tasks"]] = cell
    body: list[list[Cell | str]] = [
        [f"{method_name(method)}, {rule_name(rule)}", *(of.get(size, "–") for size in sizes)]
        for (method, rule), of in cells.items()
    ]
    title = criterion(key, errors_only).title
    caption = f"{title}: mean ± standard deviation over subsets, then over seeds, where there are several"
    notes = ["", *(_counts(lines, size) for size in sizes)]
    return Table(caption, ["method, rule", *(count(size, "task") for size in sizes)], body, notes, folded=True)


def _counts(lines: Lines, size: int) -> str:
    """How many subsets and seeds a column's means are over."""
    found = {(line["num_subsets"], line["num_seeds"]) for line in lines if line["num_tasks"] == size}
    subsets, seeds = (dict.fromkeys(sorted(each)) for each in zip(*found, strict=True))
    words = [
        f"{' or '.join(map(str, numbers))} {noun}{'' if list(numbers) == [1] else 's'}"
        for numbers, noun in ((subsets, "subset"), (seeds, "seed"))
    ]
    return ", ".join(words)
