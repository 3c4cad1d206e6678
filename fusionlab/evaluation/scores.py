"""Exact evaluation: the one function behind the fusion callback, ``validate``, ``test`` and the sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed

from fusionlab.contracts import Data, Module, Row
from fusionlab.data.limits import limited
from fusionlab.errors import InputError, did_you_mean
from fusionlab.evaluation.loop import Acting, count_batches, dealt, rank_and_world_size
from fusionlab.evaluation.primary import first_value
from fusionlab.evaluation.rows import ROW_FIELDS, rows_of


def evaluate(
    module: Module,
    data: Data,
    tasks: str | Iterable[str] | None = None,
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
        tasks: names to score, or one; all of the data's tasks by default.
        split: ``validation`` or ``test``.
        on_batch: called after each batch of this rank, for a progress bar.
        labels: further fields of the rows, e.g. ``model="fused", rule="metagpt"``.

    Returns:
        One row per task and metric, with all ``evaluation.rows.ROW_FIELDS``; what is unknown here is None.

    Raises:
        InputError: there is no such task, split or field of a row.
    """
    data = limited(data)
    named = [tasks] if isinstance(tasks, str) else list(data.tasks if tasks is None else tasks)
    _check_known("task", named, data.tasks)
    for task in named:
        _check_known(f"task {task!r}: split", [split], data.splits[task])
    _check_known("labels: field of a row", labels, ROW_FIELDS)
    advance = (lambda models: None) if on_batch is None else (lambda models: on_batch())
    return score(module, data, {"": Scored(Acting(named), labels)}, split, tasks=named, on_batch=advance)[""]


def _check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise InputError(f"{what} {name!r} is not known; {did_you_mean(name, known)}")


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
    labels = {"precision": module.precision}
    return {
        name: [
            row
            for task, metrics in of_tasks.items()
            for row in rows_of(
                *(task, split, metrics, data.splits[task][split], labels | dict(models[name].labels)),
                first_value(module, task, metrics),
            )
        ]
        for name, of_tasks in counted.items()
    }


def mean_over_ranks(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalars averaged over the ranks in one reduction; as they are without a process group.

    Every rank then logs the loss of the global batch, and all of them stop where one has a loss that is not finite.
    """
    if rank_and_world_size()[1] == 1:
        return values
    stacked = torch.stack(list(values.values())).float()
    distributed.all_reduce(stacked)
    return dict(zip(values, stacked / distributed.get_world_size(), strict=True))
