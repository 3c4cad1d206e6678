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
    measured: dict[tuple[str, str, int], dict[int, dict[tuple[str, ...], dict[str, float]]]] = {}
    errors = _errors(point for of_source in chosen.values() for point in of_source)
    for source in (source for source in sweep.sources if source.name in singles):
        known = Denominators(sweep.tasks, singles[source.name], full.get(source.name), errors)
        for point in chosen[source.name]:
            score = _score(point)
            key = (source.method, point["rule"], len(score.fused_tasks))
            measured.setdefault(key, {}).setdefault(source.seed, {})[score.fused_tasks] = measure(score, known)
    parts = ("_sub", "_all") if sweep.recipe.scored_tasks == "all" else ("_sub",)
    return [
        {"method": method, "rule": rule, "num_tasks": num_tasks, "task_known": knows_the_task(sweep.rules[rule])}
        | _means_and_spreads(by_seed, parts)
        for (method, rule, num_tasks), by_seed in sorted(measured.items(), key=lambda item: item[0])
    ]


def _means_and_spreads(
    by_seed: Mapping[int, Mapping[tuple[str, ...], Mapping[str, float]]], parts: tuple[str, ...]
) -> dict[str, Any]:
    """The mean over subsets, of each over the seeds that have it, and the spreads, by criterion that all points have.

    A spread over subsets is the mean of those within each seed that has several; one over seeds is of the means over
    the subsets that all seeds have. None where there are several, but none to compare.
    """
    every = [found for of_seed in by_seed.values() for found in of_seed.values()]
    subsets = dict.fromkeys(subset for of_seed in by_seed.values() for subset in of_seed)
    shared = [subset for subset in subsets if all(subset in of_seed for of_seed in by_seed.values())]
    means, over_subsets, over_seeds = {}, {}, {}
    for name in every[0]:
        if not name.endswith(parts) or not all(name in found for found in every):
            continue
        columns = [{subset: found[name] for subset, found in of_seed.items()} for of_seed in by_seed.values()]
        means[name] = _average(_average(column[subset] for column in columns if subset in column) for subset in subsets)
        within = [statistics.stdev(column.values()) for column in columns if len(column) > 1]
        over_subsets[name] = _average(within) if within else (0.0 if len(subsets) == 1 else None)
        of_seeds = [_average(column[subset] for subset in shared) for column in columns if shared]
        over_seeds[name] = statistics.stdev(of_seeds) if len(of_seeds) > 1 else (0.0 if len(columns) == 1 else None)
    return {
        "num_points": len(every),
        "num_subsets": len(subsets),
        "num_seeds": len(by_seed),
        "mean": means,
        "std_over_subsets": over_subsets,
        "std_over_seeds": over_seeds,
    }


def curves(sweep: Sweep, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over the fused tasks by coefficient, per method, rule, split and number of tasks.

    Coefficients that a subset of a seed does not have, which has others, are left out.
    """
    found: dict[tuple[Any, ...], dict[float, dict[tuple[Any, ...], float]]] = {}
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
        place = (record["seed"], *record["fused_tasks"])
        found.setdefault(key, {}).setdefault(coefficient(record), {})[place] = sum(values) / len(values)
    curves = []
    for (method, name, split, num_tasks), by_value in sorted(found.items()):
        places = {place for scores in by_value.values() for place in scores}
        points = [
            [value, _average(scores.values())]
            for value, scores in sorted(by_value.items())
            if len(scores) == len(places)
        ]
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
