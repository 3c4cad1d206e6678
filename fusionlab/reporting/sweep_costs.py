"""Of a sweep's report: coefficients, similarity and costs, which lie behind every protocol."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusionlab.contracts import Row
from fusionlab.evaluation.rows import higher_is_better
from fusionlab.reporting.charts import Axis, Line, LineChart, Point
from fusionlab.reporting.page import Cell, Part, Section, Table
from fusionlab.reporting.similarity import cosine_table
from fusionlab.reporting.words import PROTOCOLS, count, method_name, rule_name

_FUSED = Axis("number of fused tasks", whole=True)


def background(sweep: Mapping[str, Any], rows: Sequence[Row], name: str) -> list[Section]:
    """The sections on coefficients, on similarity and on costs.

    Args:
        sweep: the content of sweep.json.
        rows: of results.json.
        name: what the charts' files begin with.
    """
    coefficients = Section("Coefficients", level=3, parts=_coefficients(sweep, rows, name))
    similarity = Section("Similarity of the task vectors", level=3)
    similarity.text.append("Cosines near 0 mean that two tasks change the weights in unrelated directions.")
    for source, matrix in sweep["cosines"].items():
        similarity.parts.append(cosine_table(matrix, f"Cosine similarity, {_source(sweep, source)}"))
    costs = Section("Costs", level=3, parts=_costs(sweep, name))
    return [section for section in (coefficients, similarity, costs) if section.parts]


def _source(sweep: Mapping[str, Any], name: str) -> str:
    known = sweep["single_task"].get(name)
    return name if known is None else f"{method_name(known['method'])}, seed {known['seed']}"


def _coefficients(sweep: Mapping[str, Any], rows: Sequence[Row], name: str) -> list[Part]:
    parts: list[Part] = []
    better = "lower is better" if rows and not any(higher_is_better(row) for row in rows) else "higher is better"
    for split in dict.fromkeys(curve["split"] for curve in sweep["coefficient_curves"]):
        panels: dict[str, list[Line]] = {}
        for curve in sweep["coefficient_curves"]:
            if curve["split"] == split:
                panel = f"{method_name(curve['method'])}, {rule_name(curve['rule'])}"
                panels.setdefault(panel, []).append(_curve(curve))
        caption = f"Score of the fused tasks on {split} over the scaling coefficient ({better}); mean over subsets and "
        caption += "seeds that all have the coefficient"
        y = Axis(f"mean score on {split}")
        parts.append(LineChart(f"{name}-coefficients-{split}", caption, panels, Axis("scaling coefficient"), y))
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        if table := _chosen([row for row in rows if row["protocol"] == protocol], protocol):
            parts.append(table)
    return parts


def _curve(curve: Mapping[str, Any]) -> Line:
    label = count(curve["num_tasks"], "fused task")
    points = [Point(x, y, f"{label}, coefficient {x:g}: {y:.3f}") for x, y in curve["points"]]
    return Line(label, points)


def _chosen(rows: Iterable[Row], protocol: str) -> Table | None:
    """Mean, lowest and highest coefficient by method, rule and number of tasks, each model's tasks together."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        of = row["scaling_coefficients"] or {}
        if row["denominator"] == "own" and of and all(isinstance(value, float) for value in of.values()):
            place = found.setdefault((row["method"], row["rule"]), {})
            place.setdefault(len(row["fused_tasks"]), []).extend(of.values())
    if not found:
        return None
    sizes = sorted({size for of in found.values() for size in of})
    body: list[list[Cell | str]] = [
        [f"{method_name(method)}, {rule_name(rule)}", *(_range(of[size]) if size in of else "–" for size in sizes)]
        for (method, rule), of in found.items()
    ]
    caption = f"Scaling coefficients, {PROTOCOLS[protocol]}: mean over tasks, subsets and seeds, and the range"
    return Table(caption, ["method, rule", *(count(size, "task") for size in sizes)], body, folded=True)


def _range(values: Sequence[float]) -> Cell:
    mean, low, high = math.fsum(values) / len(values), min(values), max(values)
    return Cell(f"{mean:.3f}", "" if high - low < 5e-4 else f"{low:.3f} to {high:.3f}", mean)


def _costs(sweep: Mapping[str, Any], name: str) -> list[Part]:
    parts: list[Part] = []
    panels: dict[str, list[Line]] = {}
    for method in dict.fromkeys(cost["method"] for cost in sweep["costs"]):
        of = [cost for cost in sweep["costs"] if cost["method"] == method]
        panels[method_name(method)] = [_cost_line(of, rule) for rule in dict.fromkeys(cost["rule"] for cost in of)]
    if panels:
        caption = "Seconds per point, by number of fused tasks: search, fusing and scoring together"
        parts.append(LineChart(f"{name}-costs", caption, panels, _FUSED, Axis("seconds per point")))
        parts.append(_cost_table(sweep["costs"]))
    if sweep["fits"]:
        body = [
            [f"{method_name(fit['method'])}, seed {fit['seed']}", f"{fit['seconds']:,.1f}",
             f"{fit['peak_bytes'] / 1e6:,.0f}"]
            for fit in sweep["fits"]
        ]  # fmt: skip
        parts.append(Table("Fine-tuning of all tasks", ["run", "seconds", "peak memory, MB"], body))
    if sweep["searches"]:
        parts.append(_search_table(sweep["searches"]))
    return parts


def _cost_line(costs: Sequence[Mapping[str, Any]], rule: str) -> Line:
    points = []
    for cost in (cost for cost in costs if cost["rule"] == rule):
        seconds = cost["seconds"] / cost["points"]
        told = f"{rule_name(rule)}, {count(cost['num_tasks'], 'fused task')}: {seconds:.3g} s a point, "
        points.append(Point(cost["num_tasks"], seconds, told + count(cost["points"], "point")))
    return Line(rule_name(rule), points)


def _cost_table(costs: Sequence[Mapping[str, Any]]) -> Table:
    body = [
        [f"{method_name(cost['method'])}, {rule_name(cost['rule'])}", str(cost["num_tasks"]), f"{cost['points']:,}",
         f"{cost['seconds']:,.1f}", f"{cost['fuse_seconds']:,.2f}", f"{cost['passes']:,.1f}",
         f"{cost['peak_bytes'] / 1e6:,.0f}"]
        for cost in costs
    ]  # fmt: skip
    header = ["method, rule", "fused tasks", "points", "seconds", "fusing, s", "passes over data", "peak memory, MB"]
    return Table("Costs of all points together; passes are over all tasks' data", header, body, folded=True)


def _search_table(searches: Sequence[Mapping[str, Any]]) -> Table:
    fields = ("num_samples", "num_labels", "passes", "seconds")
    body = [
        [f"{method_name(each['method'])}, {rule_name(each['rule'])}", str(each["num_tasks"]),
         *(f"{each[field]:,.1f}" for field in fields)]
        for each in searches
    ]  # fmt: skip
    header = ["search", "fused tasks", "samples seen", "labels seen", "passes over them", "seconds"]
    return Table("What searches looked at and what they cost, mean over subsets and seeds", header, body)
