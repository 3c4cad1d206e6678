"""Means and spreads over subsets and seeds, curves over coefficients, and what it cost: the tables of a sweep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from fusionlab.commands.sweep.counted import LOOKED_AT, coefficient
from fusionlab.commands.sweep.execute import Sweep
from fusionlab.evaluation.rows import higher_is_better
from fusionlab.reporting.protocols import Denominators, Score, measure
from fusionlab.rules import is_open
from fusionlab.search import knows_the_task


def summaries(
    sweep: Sweep,
    chosen: Mapping[str, list[dict[str, Any]]],
    singles: Mapping[str, Mapping[str, float]],
    full: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """One line per method, rule and number of tasks: means, and spreads over subsets and over seeds."""
    measured: dict[tuple[str, str, int], dict[int, list[dict[str, float]]]] = {}
    errors = _errors(point for of_source in chosen.values() for point in of_source)
    for source in sweep.fitted:
        known = Denominators(sweep.tasks, singles[source.name], full.get(source.name), errors)
        for point in chosen[source.name]:
            key = (source.method, point["rule"], len(point["fused_tasks"]))
            measured.setdefault(key, {}).setdefault(source.seed, []).append(measure(_score(point), known))
    lines = []
    for (method, rule, num_tasks), by_seed in sorted(
        measured.items(), key=lambda item: (item[0][0], item[0][1], item[0][2])
    ):
        every = [found for of_seed in by_seed.values() for found in of_seed]
        criteria = [
            name
            for name in every[0]
            if all(name in found for found in every) and (sweep.recipe.scored_tasks == "all" or name.endswith("_sub"))
        ]
        seed_means = {
            name: [_average(found[name] for found in of_seed) for of_seed in by_seed.values()] for name in criteria
        }
        lines.append(
            {
                "method": method,
                "rule": rule,
                "num_tasks": num_tasks,
                "task_known": knows_the_task(sweep.rules[rule]),
                "num_subsets": min(map(len, by_seed.values())),
                "num_seeds": len(by_seed),
                "mean": {name: _average(found[name] for found in every) for name in criteria},
                "std_over_subsets": {
                    name: _average(_std([found[name] for found in of_seed]) for of_seed in by_seed.values())
                    for name in criteria
                },
                "std_over_seeds": {name: _std(seed_means[name]) for name in criteria},
            }
        )
    return lines


def curves(sweep: Sweep, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over the fused tasks by coefficient, where all subsets have it: per method, rule, split, number of tasks."""
    found: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    records = list(records)
    counted = set(sweep.tasks) - _errors(records) or set(sweep.tasks)
    for record in records:
        rule = sweep.rules[record["rule"]]
        if record["kind"] != "point" or not is_open(rule):
            continue
        values = [row["value"] for row in record["values"] if row["task"] in {*record["fused_tasks"]} & counted]
        if not values:
            continue
        key = (record["method"], record["rule"], record["split"], len(record["fused_tasks"]))
        found.setdefault(key, {}).setdefault(coefficient(record), []).append(sum(values) / len(values))
    curves = []
    for (method, name, split, num_tasks), by_value in sorted(found.items()):
        most = max(len(values) for values in by_value.values())
        points = [[value, _average(scores)] for value, scores in sorted(by_value.items()) if len(scores) == most]
        if len(points) > 1:
            curves.append({"method": method, "rule": name, "split": split, "num_tasks": num_tasks, "points": points})
    return curves


def costs(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per method, rule and number of tasks: seconds, seconds of fusing and passes in all, and peak memory.

    A search's points tell their cost themselves, its record the rest.
    """
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for record in records:
        key = (record["method"], record["rule"], len(record["fused_tasks"]))
        found.setdefault(key, []).append(record["cost"])
    return [
        {"method": method, "rule": rule, "num_tasks": size, "points": len(costs)}
        | {name: math.fsum(cost.get(name, 0.0) for cost in costs) for name in ("seconds", "fuse_seconds", "passes")}
        | {"peak_bytes": max(cost["peak_bytes"] for cost in costs)}
        for (method, rule, size), costs in sorted(found.items())
    ]


def searches(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What searches looked at, on average, per method, rule and number of tasks."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "search":
            found.setdefault((record["method"], record["rule"], len(record["fused_tasks"])), []).append(record)
    return [
        {"method": method, "rule": rule, "num_tasks": size, "seconds": _average(r["cost"]["seconds"] for r in of)}
        | {field: _average(record[field] for record in of) for field in LOOKED_AT}
        for (method, rule, size), of in sorted(found.items())
    ]


def _score(point: Mapping[str, Any]) -> Score:
    return Score(tuple(point["fused_tasks"]), (), {row["task"]: row["value"] for row in point["values"]})


def _errors(records: Iterable[Mapping[str, Any]]) -> set[str]:
    """The tasks whose score is an error, which is better where it is lower."""
    return {row["task"] for record in records for row in record.get("values", ()) if not higher_is_better(row)}


def _average(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
