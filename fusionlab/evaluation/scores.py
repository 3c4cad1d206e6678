"""Exact evaluation: the one function behind the fusion callback, ``validate``, ``test`` and the sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from fusionlab.samplers import FirstSamples

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
    module: Any,
    data: Any,
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
    rank, world_size = rank_and_world_size()
    rows = []
    with evaluating(module):
        for task in data.tasks if tasks is None else tasks:
            metrics = module.metrics(task)
            for batch in data.eval_batches(task, split, rank=rank, world_size=world_size):
                module.score(task, to_device(batch, module.device), metrics)
                if on_batch is not None:
                    on_batch()
            rows += rows_of(task, split, metrics, data.splits[task][split], labels)
    return rows


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """No gradient, evaluation mode and the module's precision; every part's mode is put back at the end."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), module.evaluation_context():
            yield
    finally:
        for part, was_training in flags:
            part.training = was_training


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


def rows_of(task: str, split: str, metrics: Any, samples: Any, labels: dict[str, Any]) -> list[Row]:
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


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def mean_over_ranks(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalars averaged over the ranks in one reduction; as they are without a process group.

    Every rank then logs the loss of the global batch, and all of them stop where one has a loss that is not finite.
    """
    if rank_and_world_size()[1] == 1:
        return values
    stacked = torch.stack(list(values.values())).float()
    distributed.all_reduce(stacked)
    return dict(zip(values, stacked / distributed.get_world_size(), strict=True))


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
