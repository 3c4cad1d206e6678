"""The metric of a task that means and choices are made by, asked of the module."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cache

from torchmetrics import MetricCollection

from fusionlab.contracts import Module, primary_metric
from fusionlab.errors import InputError
from fusionlab.evaluation.rows import nothing_to_choose_by

_log = logging.getLogger(__name__)


def first_value(module: Module, task: str, metrics: MetricCollection) -> str | None:
    """What the module says that means and choices are made by; None for the first metric.

    Where a mapping may have had another order, which torchmetrics does not keep, it is told once which one is first.
    """
    said, names = primary_metric(module, task), list(map(str, metrics.keys(keep_base=True)))
    of_a_list = all(name == type(metric).__name__ for name, metric in metrics.items(keep_base=True, copy_state=False))
    if said is None and len(names) > 1 and names == sorted(names) and not of_a_list:
        _tell(type(module).__name__, names[0], ", ".join(names))
    return said


@cache
def _tell(module: str, first: str, names: str) -> None:
    _log.warning(
        "means and choices are made by %s, the first metric of %s (%s): MetricCollection sorts the names of a mapping. "
        "To take another, give it a list, or let %s.primary_metric(task) give its name",
        *(first, module, names, module),
    )


def check_choice(module: Module, together: Iterable[Sequence[str]], rules: str) -> None:
    """Raise if a module's metrics do not say what is better, as far as that is known before they have counted.

    Args:
        module: whose tasks are prepared.
        together: tasks by whose mean score a choice is made, for every choice.
        rules: what chooses, for the message.

    Raises:
        InputError: none of the first metrics of tasks that are scored together says it.
    """
    unknown: dict[str, str | None] = {}
    for tasks in together:
        unknown |= {task: _unknown(module, task) for task in tasks if task not in unknown}
        told = [value for task in tasks if (value := unknown[task]) is not None]
        if len(told) == len(tasks):
            raise InputError(f"{rules}: {nothing_to_choose_by(told)}; or leave these rules out")


def _unknown(module: Module, task: str) -> str | None:
    """The value that choices are made by, where it does not say what is better."""
    metrics = module.metrics(task)
    first, values = first_value(module, task, metrics), dict(metrics.items(copy_state=False))
    name = first or next(iter(values), "")
    if name in values:  # else one of a metric that gives several
        return f"{name} of {task}" if values[name].higher_is_better is None else None
    return None
