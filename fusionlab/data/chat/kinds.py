"""The kinds of instruction tasks: what each can be scored by, and what scoring needs of one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fusionlab.backbones.tokenizers import Frame
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
        num_closing: how many tokens close each.
        end_ids: tokens that end an answer beside those that the model itself says.
        packed_length: tokens of a training row that holds several samples; None where a row is one sample.
        longest: tokens of the longest sample that was loaded.
        longest_prompt: tokens of the longest prompt that was loaded to be answered, which those of training are not.
        largest_id: the largest id of a token that was loaded.
        num_opening: how many tokens the template writes before the content of every label word.
        frame: the texts that it writes around the content of a generated answer.
    """

    name: str
    kind: str
    metric: str
    label_words: tuple[str, ...] | None
    answer_ids: tuple[tuple[int, ...], ...]
    num_closing: tuple[int, ...]
    end_ids: tuple[int, ...]
    packed_length: int | None = None
    longest: int = 0
    longest_prompt: int = 0
    largest_id: int = 0
    num_opening: int = 0
    frame: Frame = field(default_factory=Frame)

    def with_lengths(self, lengths: Iterable[int], of_prompts: Iterable[int], largest_id: int = 0) -> ChatTask:
        """The task, which has samples and prompts of these lengths, and tokens up to this id, too."""
        longest, longest_prompt = max([self.longest, *lengths]), max([self.longest_prompt, *of_prompts])
        largest_id = max(self.largest_id, largest_id)
        return replace(self, longest=longest, longest_prompt=longest_prompt, largest_id=largest_id)


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
