"""From the ledger to tables: each protocol's points, their means over subsets and seeds, and the files of the sweep."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusionlab.adapters import base_state
from fusionlab.commands.sweep.choosing import SPLITS, Subset, Tried, choose, score_of
from fusionlab.commands.sweep.execute import Sweep
from fusionlab.commands.sweep.identity import RunIdentity
from fusionlab.commands.sweep.sources import RunSource
from fusionlab.contracts import Row
from fusionlab.evaluation.rows import ROW_FIELDS, higher_is_better
from fusionlab.evaluation.rows import SCHEMA as ROWS
from fusionlab.files import write_text
from fusionlab.keys import plain
from fusionlab.layout import RESULTS, SWEEP
from fusionlab.reporting import share, single_task_values
from fusionlab.reporting.diagnostics import cosines, gram_matrix
from fusionlab.reporting.protocols import Denominators, Score, measure
from fusionlab.rules import coefficient_of, from_config, is_open, to_config
from fusionlab.search import Search

SCHEMA = 1
LOOKED_AT = ("num_samples", "num_labels", "passes")


def write_sweep(sweep: Sweep) -> Path:
    """Write sweep.json and results.json below the sweep's folder; returns the first's path."""
    every = list(sweep.ledger.records())
    identities = {(source.method, source.seed): sweep.identity(source) for source in sweep.sources}
    records = [record for record in every if record["kind"] != "fit" and _belongs(record, sweep, identities)]
    singles = {source.name: sweep.single_task(source) for source in sweep.sources}
    full = _full(sweep, singles)
    chosen = {protocol: _chosen(sweep, records, protocol, singles) for protocol in sweep.recipe.protocols}
    summary = [
        line | {"protocol": protocol}
        for protocol, of_runs in chosen.items()
        for line in _summaries(sweep, of_runs, singles, full)
    ]
    content = {
        "schema": SCHEMA,
        "tasks": list(sweep.tasks),
        "backbone": sweep.bench.module.backbone.name,
        "single_task": {
            source.name: {"method": source.method, "seed": source.seed, "values": singles[source.name]}
            for source in sweep.sources
        },
        "summary": summary,
        "coefficient_curves": _curves(sweep, records),
        "costs": _costs(records),
        "fits": [
            {"method": record["method"], "seed": record["seed"], **record["cost"]}
            for record in every
            if record["kind"] == "fit"
        ],
        "searches": _searches(records),
        "cosines": {source.name: _cosines(sweep, source) for source in sweep.sources},
    }
    path = sweep.output / SWEEP
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    rows = [
        row
        for protocol, of_runs in chosen.items()
        for name, found in of_runs.items()
        for record in found
        for row in _rows(record, protocol, singles[name], full.get(name))
    ]
    write_text(sweep.output / RESULTS, json.dumps({"schema": ROWS, "rows": rows}, indent=1, allow_nan=False) + "\n")
    return path


def _belongs(record: Mapping[str, Any], sweep: Sweep, identities: Mapping[tuple[str, int], RunIdentity]) -> bool:
    """Whether this recipe asks for it: the ledger also keeps what earlier ones called by the same rule name.

    So it keeps the points of a run that was fitted anew since, which go by other hashes.
    """
    identity, rule = identities.get((record["method"], record["seed"])), sweep.rules.get(record["rule"])
    if identity is None or rule is None or tuple(record["fused_tasks"]) not in set(sweep.subsets):
        return False
    search = rule if isinstance(rule, Search) else None
    if (record["kind"] == "search" and search is None) or not identity.holds(record, search):
        return False
    return search is not None or is_open(rule) or record["rule_config"] == plain(to_config(rule))


def _full(sweep: Sweep, singles: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Each run's denominators ``full``: the given reference, else the sweep's own full run of that seed, else none."""
    if sweep.recipe.full_reference is not None:
        values: dict[str, float] = {}
        for (task, _), value in single_task_values(Path(sweep.recipe.full_reference)).items():
            values.setdefault(task, value)
        return {source.name: values for source in sweep.sources}
    by_seed = {source.seed: dict(singles[source.name]) for source in sweep.sources if source.method == "full"}
    return {source.name: by_seed[source.seed] for source in sweep.sources if source.seed in by_seed}


def _chosen(
    sweep: Sweep,
    records: Iterable[dict[str, Any]],
    protocol: str,
    singles: Mapping[str, Mapping[str, float]],
) -> dict[str, list[dict[str, Any]]]:
    """By run, the test record that counts for every rule and subset."""
    found: dict[str, list[dict[str, Any]]] = {source.name: [] for source in sweep.sources}
    for source in sweep.sources:
        for name, rule in sweep.rules.items():
            of = [
                record
                for record in records
                if record["kind"] == "point"
                and (record["method"], record["seed"], record["rule"]) == (source.method, source.seed, name)
            ]
            if is_open(rule):
                found[source.name] += _with_coefficients_chosen(sweep, source, of, protocol, singles[source.name])
                continue
            for subset in sweep.subsets:
                tested = [point for point in of if point["split"] == "test" and tuple(point["fused_tasks"]) == subset]
                found[source.name] += _found_by_search(tested, records, source, name, subset, rule)
    return found


def _with_coefficients_chosen(
    sweep: Sweep, source: RunSource, points: Iterable[dict[str, Any]], protocol: str, single: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Of an open rule's points, each subset's test point of the coefficient that the protocol chooses."""
    by_place = {(tuple(each["fused_tasks"]), _coefficient(each), each["split"]): each for each in points}

    looks: dict[Subset, list[dict[str, Any]]] = {subset: [] for subset in sweep.subsets}

    def score(tried: Sequence[Tried]) -> list[float]:
        found = [by_place[(*each, SPLITS[protocol])] for each in tried]
        for (subset, _), point in zip(tried, found, strict=True):
            looks[subset].append(point)
        return [score_of(protocol, point["values"], single) for point in found]

    chosen = choose(sweep.subsets, score, sweep.looks(source, protocol))
    return [{**by_place[subset, chosen[subset], "test"], "looked_at": _looks(looks[subset])} for subset in looks]


def _looks(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a choice of a coefficient looked at, as a row tells it."""
    samples = sum(row["num_samples"] for row in points[0]["values"])
    return {"num_samples": samples, "num_labels": samples, "passes": float(len(points))}


def _found_by_search(
    tested: list[dict[str, Any]], records: Iterable[dict[str, Any]], source: Any, name: str, subset: Any, rule: Any
) -> list[dict[str, Any]]:
    if not isinstance(rule, Search):
        return tested
    searches = [
        record
        for record in records
        if record["kind"] == "search"
        and (record["method"], record["seed"], record["rule"]) == (source.method, source.seed, name)
        and tuple(record["fused_tasks"]) == subset
    ]
    return [
        {**point, "looked_at": {key: search[key] for key in LOOKED_AT}}
        for point in tested
        for search in searches[:1]
        if point["rule_config"] in [each["rule_config"] for each in searches]
    ]


def _coefficient(point: Mapping[str, Any]) -> float:
    return coefficient_of(from_config(point["rule_config"]))


def _score(point: Mapping[str, Any]) -> Score:
    return Score(tuple(point["fused_tasks"]), (), {row["task"]: row["value"] for row in point["values"]})


def _summaries(
    sweep: Sweep,
    chosen: Mapping[str, list[dict[str, Any]]],
    singles: Mapping[str, Mapping[str, float]],
    full: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """One line per method, rule and number of tasks: means, and spreads over subsets and over seeds."""
    measured: dict[tuple[str, str, int], dict[int, list[dict[str, float]]]] = {}
    errors = _errors(point for of_source in chosen.values() for point in of_source)
    for source in sweep.sources:
        known = Denominators(sweep.tasks, singles[source.name], full.get(source.name), errors)
        for point in chosen[source.name]:
            key = (source.method, point["rule"], len(point["fused_tasks"]))
            measured.setdefault(key, {}).setdefault(source.seed, []).append(measure(_score(point), known))
    lines = []
    for (method, rule, num_tasks), by_seed in sorted(
        measured.items(), key=lambda item: (item[0][0], item[0][1], item[0][2])
    ):
        every = [found for of_seed in by_seed.values() for found in of_seed]
        criteria = [name for name in every[0] if all(name in found for found in every)]
        seed_means = {
            name: [_average(found[name] for found in of_seed) for of_seed in by_seed.values()] for name in criteria
        }
        lines.append(
            {
                "method": method,
                "rule": rule,
                "num_tasks": num_tasks,
                "num_subsets": len(next(iter(by_seed.values()))),
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


def _errors(records: Iterable[Mapping[str, Any]]) -> set[str]:
    """The tasks whose score is an error, which is better where it is lower."""
    return {row["task"] for record in records for row in record.get("values", ()) if not higher_is_better(row)}


def _curves(sweep: Sweep, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
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
        found.setdefault(key, {}).setdefault(_coefficient(record), []).append(sum(values) / len(values))
    curves = []
    for (method, name, split, num_tasks), by_value in sorted(found.items()):
        most = max(len(values) for values in by_value.values())
        points = [[value, _average(scores)] for value, scores in sorted(by_value.items()) if len(scores) == most]
        if len(points) > 1:
            curves.append({"method": method, "rule": name, "split": split, "num_tasks": num_tasks, "points": points})
    return curves


def _costs(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
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


def _searches(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
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


def _cosines(sweep: Sweep, source: Any) -> dict[str, dict[str, float]]:
    """Cosine similarity of every pair of task vectors, float64."""
    weights, base = sweep.finetuned(source).weights, base_state(sweep.bench.module.base_model)
    return cosines(gram_matrix(base, {task: weights[task] for task in sweep.tasks}))


def _rows(
    record: Mapping[str, Any], protocol: str, own: Mapping[str, float], full: Mapping[str, float] | None
) -> list[Row]:
    """Result rows, once per denominator, labelled with the protocol."""
    rows = []
    for name, values in (("own", own), ("full", full)):
        for row in record["values"] if values is not None else ():
            assert values is not None
            single = values.get(row["task"])
            fields = {
                **row,
                "higher_is_better": higher_is_better(row),
                "task_known": False,
                "search": record.get("looked_at"),
                "model": "fused",
                "method": record["method"],
                "seed": record["seed"],
                "rule": record["rule"],
                "split": record["split"],
                "fused_tasks": record["fused_tasks"],
                "scaling_coefficients": record["scaling_coefficients"],
                "denominator": name,
                "normalized": share(row["value"], single if higher_is_better(row) else None),
            }
            rows.append({**{field: fields.get(field) for field in ROW_FIELDS}, "protocol": protocol})
    return rows


def _average(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
