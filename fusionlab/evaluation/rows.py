"""Result rows: their fields, what makes a row of a metric, what choices are made of, and reading old ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, SupportsFloat

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from fusionlab.contracts import Row
from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.evaluation.functional import standard_error
from fusionlab.evaluation.metrics import RankedAccuracy, Score, ScoreCorrelation
from fusionlab.foreign import read_json
from fusionlab.samplers import FirstSamples, Split

SCHEMA = 2
_log = logging.getLogger(__name__)
ROW_FIELDS = (
    "model", "method", "task", "split", "metric", "value", "num_samples", "rule", "scaling_coefficients",
    "fused_tasks", "finetuned_on", "denominator", "normalized", "data_version", "seed", "scored_by",
    "higher_is_better", "stderr", "precision", "task_known", "search",
)  # fmt: skip
"""Fields of every row; those from ``higher_is_better`` on came with schema 2.

``higher_is_better``: True, False, or None where that is not known, as of a count of faults. ``stderr``: of a share of
the samples; None where it is not known. ``precision``: what the trainer computed in. ``task_known``: whether the model
was told each input's task. ``search``: samples, labels and passes of the search that found the model; None for none.
Seconds, which no two runs share, are in a sweep's ledger.
"""
LM_EVAL = "lm_eval"
"""The further field of a row that lm-eval scored: versions, few-shots, limit, filter."""
_EXPONENTIAL = ("perplexity",)  # metrics that are the exponential of a mean loss
_NEEDED = {"metric", "value"}
_LOWER_BEFORE = ("perplexity",)  # metrics of schema 1
_FAULTS = (*RankedAccuracy.faults, *ScoreCorrelation.faults)


@dataclass(frozen=True)
class _Value:
    """What a value of a metric is."""

    higher_is_better: bool | None
    is_share: bool = False


def rows_of(
    task: str,
    split: str,
    metrics: MetricCollection,
    samples: Split,
    labels: Mapping[str, Any],
    first: str | None = None,
) -> list[Row]:
    """One row per value of a scored task's metrics, with all :data:`ROW_FIELDS`; ``limited`` where it is of a part.

    Args:
        task: its name.
        split: its name.
        metrics: that have counted all of the samples.
        samples: the split.
        labels: further fields.
        first: the value that means and choices are made of, whose row comes first; that of the first metric by default.

    Raises:
        InputError: a value is no number, or not finite, or there is none that is called ``first``.
    """
    computed = metrics.compute()
    values, kinds = _numbers(f"task {task!r}, {split}", computed), _kinds(metrics, list(computed))
    if first is not None and first not in values:
        raise InputError(f"task {task!r}: primary_metric is {first!r}; {did_you_mean(first, values)}")
    if broken := [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]:
        raise InputError(f"task {task!r}, {split}: {name_list(broken)}, which is no score; change metric or samples")
    known = {"task": task, "split": split, "num_samples": len(samples), "data_version": samples.data_version}
    known |= {"task_known": False} | dict(labels)
    unknown = set(known) - set(ROW_FIELDS)
    assert not unknown, f"no such row field: {unknown}"
    limited = {"limited": samples.limited} if isinstance(samples, FirstSamples) else {}
    return [
        {field: {**known, **_told(name, value, kinds[name], len(samples))}.get(field) for field in ROW_FIELDS} | limited
        for name, value in sorted(values.items(), key=lambda item: item[0] != first)
    ]


def _numbers(where: str, values: Mapping[str, object]) -> dict[str, float]:
    """Values as floats.

    Raises:
        InputError: naming those that are no single number.
    """
    found: dict[str, float] = {}
    told: list[str] = []
    for name, value in values.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            told.append(f"{name} has shape {tuple(value.shape)}")
        elif isinstance(value, SupportsFloat):
            found[name] = float(value)
        else:
            told.append(f"{name} is a {type(value).__name__}")
    if told:
        raise InputError(
            f"{where}: expected one number of each metric, and {name_list(told)}; let it give a mean, such as "
            f"average='macro', or a mapping of names to numbers"
        )
    return found


def _told(name: str, value: float, kind: _Value, num_samples: int) -> Row:
    error = standard_error(value, num_samples) if kind.is_share else None
    return {"metric": name, "value": value, "higher_is_better": kind.higher_is_better, "stderr": error}


def _kinds(metrics: MetricCollection, names: Sequence[str]) -> dict[str, _Value]:
    """What each value of a collection is, by the name that the collection gives it.

    A metric with several values has names of its own for them, to which the collection adds; it keeps their order.

    Args:
        metrics: the collection.
        names: of all its values.

    Raises:
        InputError: two values have one name.
    """
    found: list[_Value] = []
    for name, metric in metrics.items():
        values = metric.compute()
        found += [_kind(metric, each) for each in (values if isinstance(values, Mapping) else [name])]
    if len(names) != len(found):
        raise InputError(f"two values of the metrics have one name, got {name_list(names)}; rename a metric")
    return dict(zip(names, found, strict=True))


def _kind(metric: Metric, name: str) -> _Value:
    if isinstance(metric, Score):
        return _Value(None) if name in metric.faults else _Value(metric.higher_is_better, metric.is_share)
    return _Value(metric.higher_is_better)


def higher_is_better(row: Mapping[str, Any]) -> bool | None:
    """Whether a row's value is better where it is higher; None where that is not known. Schema 1 said it by metric."""
    if "higher_is_better" in row:
        said: bool | None = row["higher_is_better"]
        return said
    return None if row["metric"] in _FAULTS else row["metric"] not in _LOWER_BEFORE


def counts_faults(row: Mapping[str, Any]) -> bool:
    """Whether a row's value is a number of answers that count as wrong or could go either way."""
    return higher_is_better(row) is None and row["metric"] in _FAULTS and LM_EVAL not in row


def is_score(row: Mapping[str, Any]) -> bool:
    """Whether a row has a value of a task of the data, that tables and charts show; no count of faults."""
    return not counts_faults(row) and LM_EVAL not in row


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file, of this schema or of 1, whose further fields are filled in where they are known.

    Raises:
        InputError: no JSON, or not what this package writes.
    """
    rows = read_json(path).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) >= _NEEDED for row in rows):
        raise InputError(
            f"{str(path)!r} has no rows with {', '.join(sorted(_NEEDED))}; give the folder of a run or sweep"
        )
    told = ("stderr", "higher_is_better")  # what schema 1 kept among what is lm-eval's own
    rows = [{key: value for key, value in row.get(LM_EVAL, {}).items() if key in told} | row for row in rows]
    return [{**dict.fromkeys(ROW_FIELDS), **row, "higher_is_better": higher_is_better(row)} for row in rows]


def primary_rows(rows: Iterable[Row]) -> list[Row]:
    """Of each task the rows of its first metric: the one that means and choices are made of."""
    rows = list(rows)
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row["task"], row["metric"])
    return [row for row in rows if row["metric"] == first[row["task"]]]


def shown_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows as tables have them: fine-tuned models on their own tasks alone, each value under one denominator.

    Where there is one fine-tuned model and nothing beside it, all its rows, and the model's name tells its task.
    """
    rows = [row for row in rows if row["denominator"] in (None, "own")]
    if len({(row["model"], row.get("finetuned_on")) for row in rows}) == 1 and any(not _is_own(row) for row in rows):
        return [{**row, "model": f"fine-tuned on {row['finetuned_on']}"} for row in rows]
    return [row for row in rows if _is_own(row)]


def _is_own(row: Row) -> bool:
    return row["model"] != "finetuned" or row["finetuned_on"] in (None, row["task"])


def averaged(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that one mean may hold: those that are better where higher; errors only where there is nothing else.

    Example:
        >>> error = {"task": "a", "metric": "error", "value": 9.0, "higher_is_better": False}
        >>> averaged([error, {"task": "b", "metric": "accuracy", "value": 0.5}])
        [{'task': 'b', 'metric': 'accuracy', 'value': 0.5}]
        >>> averaged([error]) == [error]
        True
    """
    rows = list(rows)
    return [row for row in rows if higher_is_better(row)] or [row for row in rows if higher_is_better(row) is False]


def nothing_to_choose_by(values: Iterable[str]) -> str:
    """What is said of values that do not say what is better."""
    return (
        f"nothing to choose by: {name_list(dict.fromkeys(values))} says neither that higher nor that lower is better; "
        f"give its metric class higher_is_better, as torchmetrics asks"
    )


def mean_score(rows: Iterable[Mapping[str, Any]]) -> float:
    """What choices are made by: the mean of the rows' values, the higher the better.

    Values that are better where they are lower are never averaged with others: they count where there is nothing else,
    as their negative mean, perplexities by their logarithm, which is the mean loss that they are made of.

    Example:
        >>> mean_score([{"metric": "accuracy", "value": 0.5}, {"metric": "perplexity", "value": 9.0}])
        0.5
        >>> mean_score([{"metric": "error", "value": 0.5, "higher_is_better": False}])
        -0.5

    Raises:
        InputError: no metric says what is better.
    """
    rows = list(rows)
    if not (counted := averaged(rows)):
        raise InputError(nothing_to_choose_by(f"{row['metric']} of {row['task']}" for row in rows))
    if left := dict.fromkeys(row["metric"] for row in rows if row not in counted):
        _tell_left_out(", ".join(dict.fromkeys(row["metric"] for row in counted)), ", ".join(left))
    scores: list[float] = [row["value"] for row in counted]
    if not higher_is_better(counted[0]):
        scores = [-math.log(row["value"]) if row["metric"] in _EXPONENTIAL else -row["value"] for row in counted]
    return sum(scores) / len(scores)


@cache
def _tell_left_out(counted: str, left: str) -> None:
    _log.warning(
        "choices are made by the mean of %s alone: tasks that are scored by %s, which is in another unit, have no say "
        "in them; choose for those in a run of their own",
        *(counted, left),
    )
