"""How a language model's tasks with label words are answered: by ranking, or by generating."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from fusionlab.errors import InputError, did_you_mean

Evaluation = Literal["rank", "generate"]


@runtime_checkable
class Asked(Protocol):
    """Batches of questions that are known before any is answered."""

    questions: Sequence[Any]


def check_evaluation(evaluation: Evaluation | dict[str, Evaluation], tasks: Collection[str]) -> None:
    """Raise if tasks are named that there are not; where there is none, as in ``predict``, none is asked for.

    Raises:
        InputError: naming the first.
    """
    if not isinstance(evaluation, dict) or not tasks:
        return
    for name in evaluation:
        if name not in tasks:
            raise InputError(f"evaluation for unknown task {name!r}; {did_you_mean(name, tasks)}")


def is_generated(evaluation: Evaluation | dict[str, Evaluation], task: str) -> bool:
    """Whether the answers of a task with label words are generated; ranked where it is not named."""
    return (evaluation.get(task) if isinstance(evaluation, dict) else evaluation) == "generate"


def check_generated(longest: int, max_new_tokens: int, task: str) -> None:
    """Raise if a label word of so many tokens cannot be generated.

    Raises:
        InputError: with both numbers.
    """
    if longest > max_new_tokens:
        raise InputError(
            f"the longest label word of task {task!r} has {longest} tokens, but max_new_tokens is {max_new_tokens}; "
            f"raise it"
        )
