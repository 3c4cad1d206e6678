"""Models that are equal by construction: scored once, whichever process and rule comes first, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fusionlab.commands.sweep.identity import RunIdentity
from fusionlab.commands.sweep.ledger import Ledger
from fusionlab.fusion.finetuned import Fused

Record = dict[str, Any]


class KnownModels:
    """The rows of one run's weighted sums by their coefficients, among all processes of a sweep.

    The average is task arithmetic at 1/T, MetaGPT at equal norms too, its multiplier 1 is MetaGPT, and what has zero
    coefficients alone is the pretrained model, whatever is fused.

    Args:
        ledger: where the rows are, by model, split and the tasks that it was scored on.
        identity: the keys.
    """

    def __init__(self, ledger: Ledger, identity: RunIdentity) -> None:
        self._ledger, self._identity = ledger, identity

    def rows(self, model: Fused, split: str, scored: Sequence[str]) -> list[Record]:
        """What is known of a model; a task that is not has no row."""
        records = (self._ledger.get(key) for key, _ in self._places(model, split, scored))
        return [row for record in records if record is not None for row in record["values"]]

    def keep(self, model: Fused, split: str, scored: Sequence[str], rows: Mapping[str, Record]) -> None:
        """Let the others know."""
        for key, tasks in self._places(model, split, scored):
            self._ledger.put(key, {"kind": "model", "values": [rows[task] for task in tasks]})

    def _places(self, model: Fused, split: str, scored: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
        """Keys with the tasks of each; the pretrained model's are task by task, as every subset may ask for it."""
        coefficients = model.by_task
        if coefficients is None:
            return
        for tasks in [scored] if coefficients else [[task] for task in scored]:
            yield self._identity.of_model(coefficients, split, tasks), tasks


def equal_models(records: Iterable[Record]) -> list[Record]:
    """By run, how many points there are and how many models these are, the others being equal by construction.

    Example:
        >>> run = {"kind": "point", "method": "lora", "seed": 1, "split": "test", "values": [{"task": "a"}]}
        >>> point = run | {"fused_tasks": ["a", "b"], "scaling_coefficients": {"a": 0.5, "b": 0.5}}
        >>> equal_models([point | {"rule": "average"}, point | {"rule": "task_arithmetic"}])
        [{'method': 'lora', 'seed': 1, 'points': 2, 'models': 1}]
    """
    found: dict[tuple[str, int], list[Any]] = {}
    for record in records:
        if record["kind"] == "point":
            found.setdefault((record["method"], record["seed"]), []).append(_model(record))
    return [
        {"method": method, "seed": seed, "points": len(models), "models": len(set(models))}
        for (method, seed), models in sorted(found.items())
    ]


def _model(point: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides a point's scores: coefficients where it is a weighted sum by tasks, else rule and tasks."""
    coefficients, scored = point["scaling_coefficients"], tuple(row["task"] for row in point["values"])
    is_sum = coefficients and not any(isinstance(value, Mapping) for value in coefficients.values())
    if is_sum:
        return point["split"], scored, *sorted((task, value) for task, value in coefficients.items() if value)
    return point["split"], scored, str(point["rule_config"]), *point["fused_tasks"]
