"""The files of a sweep: each protocol's points as rows, their means and spreads, what it cost and what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusionlab.adapters import base_state
from fusionlab.commands.sweep.choosing import by_size
from fusionlab.commands.sweep.counted import chosen_points, of_recipe
from fusionlab.commands.sweep.execute import Sweep
from fusionlab.commands.sweep.models import equal_models
from fusionlab.commands.sweep.sources import RunSource
from fusionlab.commands.sweep.summaries import costs, curves, searches, summaries
from fusionlab.contracts import Row
from fusionlab.evaluation.rows import ROW_FIELDS, higher_is_better
from fusionlab.evaluation.rows import SCHEMA as ROWS
from fusionlab.files import write_text
from fusionlab.layout import RESULTS, SWEEP
from fusionlab.reporting import share, single_task_values
from fusionlab.reporting.diagnostics import cosines, gram_matrix

SCHEMA = 1


def write_sweep(sweep: Sweep) -> dict[str, Any]:
    """Write sweep.json and results.json below the sweep's folder; returns what the first holds."""
    every = list(sweep.ledger.records())
    records = of_recipe(sweep, every)
    fitted = sweep.fitted  # once: another process may finish a run while this one writes
    runs = {(source.method, source.seed) for source in fitted}
    singles = {source.name: sweep.single_task(source) for source in fitted}
    full = _full(sweep, fitted, singles)
    chosen = {protocol: chosen_points(sweep, records, protocol, singles) for protocol in sweep.recipe.protocols}
    content = {
        "schema": SCHEMA,
        "tasks": list(sweep.tasks),
        "backbone": sweep.bench.module.backbone.name,
        "single_task": {
            source.name: {"method": source.method, "seed": source.seed, "values": singles[source.name]}
            for source in fitted
        },
        "summary": [
            line | {"protocol": protocol}
            for protocol, of_runs in chosen.items()
            for line in summaries(sweep, of_runs, singles, full)
        ],
        "missing": _missing(sweep, chosen),
        "coefficient_curves": curves(sweep, records),
        "equal_models": equal_models(records),
        "costs": costs(records),
        "fits": [
            {"method": record["method"], "seed": record["seed"], **record["cost"]}
            for record in every
            if record["kind"] == "fit" and (record["method"], record["seed"]) in runs
        ],
        "searches": searches(records),
        "cosines": {source.name: _cosines(sweep, source) for source in fitted},
    }
    write_text(sweep.output / SWEEP, json.dumps(content, indent=1, allow_nan=False) + "\n")
    rows = [
        row
        for protocol, of_runs in chosen.items()
        for name, found in of_runs.items()
        for record in found
        for row in _rows(record, protocol, singles[name], full.get(name))
    ]
    write_text(sweep.output / RESULTS, json.dumps({"schema": ROWS, "rows": rows}, indent=1, allow_nan=False) + "\n")
    return content


def _missing(sweep: Sweep, chosen: Mapping[str, Mapping[str, Iterable[Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """By protocol, run, rule and number of tasks, how many subsets have no point, where some have none."""
    found = []
    for protocol, of_runs in chosen.items():
        for source in sweep.sources:
            known = {(point["rule"], tuple(point["fused_tasks"])) for point in of_runs.get(source.name, ())}
            for rule in sweep.rules:
                for size, of_size in by_size(sweep.subsets).items():
                    if count := sum((rule, subset) not in known for subset in of_size):
                        place = {"protocol": protocol, "method": source.method, "seed": source.seed, "rule": rule}
                        found.append(place | {"num_tasks": size, "num_subsets": count})
    return found


def _full(
    sweep: Sweep, fitted: Sequence[RunSource], singles: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Each run's denominators ``full``: the given reference, else the sweep's own full run of that seed, else none."""
    if sweep.recipe.reference is not None:
        values: dict[str, float] = {}
        for (task, _), value in single_task_values(sweep.recipe.reference).items():
            values.setdefault(task, value)
        return {source.name: values for source in fitted}
    by_seed = {source.seed: dict(singles[source.name]) for source in fitted if source.method == "full"}
    return {source.name: by_seed[source.seed] for source in fitted if source.seed in by_seed}


def _cosines(sweep: Sweep, source: Any) -> dict[str, dict[str, float]]:
    """Cosine similarity of every pair of task vectors, float64."""
    weights, base = sweep.finetuned(source).weights, base_state(sweep.bench.module.base_model)
    return cosines(gram_matrix(base, {task: weights[task] for task in sweep.tasks}))


def _rows(
    record: Mapping[str, Any], protocol: str, own: Mapping[str, float], full: Mapping[str, float] | None
) -> list[Row]:
    """Result rows, once per denominator, labelled with the protocol."""
    rows, arguments = [], record["rule_config"]["init_args"]
    masked = record.get("task_known", False) and "mask_threshold" in arguments
    for name, values in (("own", own), ("full", full)):
        for row in record["values"] if values is not None else ():
            assert values is not None
            single = values.get(row["task"])
            fields = {
                **row,
                "higher_is_better": higher_is_better(row),
                "task_known": record.get("task_known", False),
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
            thresholds = {"mask_thresholds": arguments["mask_threshold"]} if masked else {}
            rows.append({**{field: fields.get(field) for field in ROW_FIELDS}, "protocol": protocol, **thresholds})
    return rows
