"""The kinds of instruction tasks: what each can be scored by, and what scoring needs of one."""

from __future__ import annotations

from dataclasses import dataclass

from fusionlab.data.tasks import Task
from fusionlab.errors import InputError

METRICS = {
    "ranked": ("accuracy", "exact_match"),
    "score": ("spearman", "pearson"),
    "asked": ("exact_match",),
    "text": ("perplexity",),
    "messages": ("exact_match", "perplexity"),
    "completion": ("exact_match", "perplexity"),
    "instruction": ("exact_match", "perplexity"),
}
"""What each kind of task can be scored by; the first is the default."""


@dataclass(frozen=True)
class ChatTask:
    """What scoring needs of a task.

    Args:
        name: the task.
        kind: ``ranked``, ``score``, or the format of its rows.
        metric: what it is scored by.
        label_words: of a ranked task, in label order; None for others.
        answer_ids: the tokens of each label word with what closes it.
        end_ids: tokens that end an answer beside those that the model itself says.
        packed_length: tokens of a training row that holds several samples; None where a row is one sample.
    """

    name: str
    kind: str
    metric: str
    label_words: tuple[str, ...] | None
    answer_ids: tuple[tuple[int, ...], ...]
    end_ids: tuple[int, ...]
    packed_length: int | None = None


def metric_of(task: Task, kind: str) -> str:
    """The metric that the task names, else the default of its kind.

    Raises:
        InputError: it does not fit the kind.
    """
    metric = task.metric or METRICS[kind][0]
    if metric not in METRICS[kind]:
        raise InputError(
            f"metric {metric!r} does not fit task {task.name!r}, whose rows are of kind {kind!r}; expected "
            f"{' or '.join(METRICS[kind])}"
        )
    return metric
