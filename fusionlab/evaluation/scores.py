"""Exact evaluation: the one function behind the fusion callback, ``validate``, ``test`` and the sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed
from torchmetrics import MetricCollection

from fusionlab.contracts import Data, Module
from fusionlab.evaluation.loop import Acting, count_batches, dealt, rank_and_world_size
from fusionlab.samplers import FirstSamples, Split

ROW_FIELDS = (
    "model", "method", "task", "split", "metric", "value", "num_samples", "rule", "scaling_coefficients",
    "fused_tasks", "finetuned_on", "denominator", "normalized", "data_version", "seed", "scored_by",
)  # fmt: skip
Row = dict[str, Any]
LM_EVAL = "lm_eval"
"""The further field of a row that lm-eval scored: versions, few-shots, limit, filter, standard error."""
# metrics that count faults; they have no share of a single-task value, and no place beside scores
COUNTS = ("unparsable", "near_ties")
# metrics that are better where they are lower; they have no share of a single-task value, and no mean with scores
LOWER_IS_BETTER = ("perplexity",)


def evaluate(
    module: Module,
    data: Data,
    tasks: Iterable[str] | None = None,
    split: str = "test",
    *,
    on_batch: Callable[[], None] | None = None,
    **labels: Any,
) -> list[Row]:
    """Score the module's active weights on every sample of every task exactly once.

    Batches are formed over the whole set with a constant shape and dealt whole to the ranks, counts are integers that
    are summed over ranks, so any number of ranks gives the same rows. No gradient, evaluation mode, restored after.

    Args:
        module: a :class:`~fusionlab.modules.FusionModule` whose tasks are prepared.
        data: a data module that is set up (``eval_batches``, ``splits``).
        tasks: names to score; all of the data's tasks by default.
        split: ``validation`` or ``test``.
        on_batch: called after each batch of this rank, for a progress bar.
        labels: further fields of the rows, e.g. ``model="fused", rule="metagpt"``.

    Returns:
        One row per task and metric, with all :data:`ROW_FIELDS`; what is unknown here is None.
    """
    named = list(data.tasks if tasks is None else tasks)
    advance = (lambda models: None) if on_batch is None else (lambda models: on_batch())
    return score(module, data, {"": Scored(Acting(named), labels)}, split, tasks=named, on_batch=advance)[""]


@dataclass(frozen=True)
class Scored:
    """A model to score.

    Args:
        model: how it acts, and on which tasks.
        labels: fields of its result rows.
    """

    model: Acting
    labels: Mapping[str, Any] = field(default_factory=dict)


def score(
    module: Module,
    data: Data,
    models: Mapping[str, Scored],
    split: str,
    *,
    tasks: Iterable[str] | None = None,
    before_batch: Callable[[], None] = lambda: None,
    on_batch: Callable[[int], None] = lambda models: None,
) -> dict[str, list[Row]]:
    """The rows of each model, as :func:`evaluate` gives them, from one pass over the data.

    Args:
        module: whose tasks are prepared.
        data: set up.
        models: by name.
        split: ``validation`` or ``test``.
        tasks: in the order of the rows; all of the data's by default.
        before_batch: called before each batch.
        on_batch: called after each batch of this rank with the number of models scored on it.
    """
    counted = count_batches(
        module,
        {name: each.model for name, each in models.items()},
        dealt(data, split),
        module.metrics,
        module.score,
        tasks=data.tasks if tasks is None else tasks,
        before_batch=before_batch,
        on_batch=on_batch,
    )
    return {
        name: [
            row
            for task, metrics in of_tasks.items()
            for row in rows_of(task, split, metrics, data.splits[task][split], dict(models[name].labels))
        ]
        for name, of_tasks in counted.items()
    }


def primary_rows(rows: Iterable[Row]) -> list[Row]:
    """Of each task the rows of its first metric: the one that means and choices are made of."""
    rows, first = list(rows), {}
    for row in rows:
        first.setdefault(row["task"], row["metric"])
    return [row for row in rows if row["metric"] == first[row["task"]]]


def mean_score(rows: Iterable[Row]) -> float:
    """What choices are made by: the mean of the rows' values, the higher the better.

    Values that are better where they are lower are never averaged with others: they count where there is nothing else,
    as the mean of −log value.
    """
    rows = list(rows)
    scores = [row["value"] for row in rows if row["metric"] not in LOWER_IS_BETTER]
    scores = scores or [-math.log(row["value"]) for row in rows]
    return sum(scores) / len(scores)


def rows_of(task: str, split: str, metrics: MetricCollection, samples: Split, labels: dict[str, Any]) -> list[Row]:
    """One row per metric of a scored task, with all :data:`ROW_FIELDS`, and ``limited`` where it is of a part."""
    values = {name: float(value) for name, value in metrics.compute().items()}
    known = {"task": task, "split": split, "num_samples": len(samples), "data_version": samples.data_version} | labels
    unknown = set(known) - set(ROW_FIELDS)
    assert not unknown, f"no such row field: {unknown}"
    limited = {"limited": samples.limited} if isinstance(samples, FirstSamples) else {}
    return [
        {field: {**known, "metric": name, "value": value}.get(field) for field in ROW_FIELDS} | limited
        for name, value in values.items()
    ]


def mean_over_ranks(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalars averaged over the ranks in one reduction; as they are without a process group.

    Every rank then logs the loss of the global batch, and all of them stop where one has a loss that is not finite.
    """
    if rank_and_world_size()[1] == 1:
        return values
    stacked = torch.stack(list(values.values())).float()
    distributed.all_reduce(stacked)
    return dict(zip(values, stacked / distributed.get_world_size(), strict=True))
