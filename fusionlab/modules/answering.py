"""How a language model's tasks with label words are answered: by ranking, or by generating."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from fusionlab.errors import InputError, did_you_mean

Evaluation = Literal["rank", "generate"]
Ranking = Literal["whole", "without_end", "per_token", "per_byte"]
_RECOMPUTED = ("lora", "l_lora")  # adapters within the layers, which are recomputed with them


@runtime_checkable
class Asked(Protocol):
    """Batches of questions that are known before any is answered."""

    questions: Sequence[Any]


def check_answers(ranking: Ranking, max_new_tokens: int) -> None:
    """Raise unless there is such a ranking, and answers have a length.

    Raises:
        InputError: with what came.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if ranking not in get_args(Ranking):
        raise InputError(f"ranking must be whole, without_end, per_token or per_byte, got {ranking!r}")


def check_recomputed(method: str) -> None:
    """Raise if what a method trains is not within the layers, which gradient checkpointing computes again.

    Raises:
        InputError: naming the method.
    """
    if method not in _RECOMPUTED:
        raise InputError(
            f"gradient_checkpointing with method {method!r} would recompute with other weights than those that act; "
            f"leave --model.gradient_checkpointing out and lower the batch size, or train by {' or '.join(_RECOMPUTED)}"
        )


def check_evaluation(evaluation: Evaluation | dict[str, Evaluation], tasks: Mapping[str, Any]) -> None:
    """Raise if tasks are named that there are not, or that are not chosen for by it.

    Where there is no task, as in ``predict``, none is asked for.

    Raises:
        InputError: naming the first.
    """
    if not isinstance(evaluation, dict) or not tasks:
        return
    for name in evaluation:
        if name not in tasks:
            raise InputError(f"evaluation for unknown task {name!r}; {did_you_mean(name, tasks)}")
        if tasks[name].label_words is None:
            raise InputError(
                f"evaluation for task {name!r}, which has no label words to rank or to generate: its rows alone say "
                f"how it is scored; leave it out"
            )


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


def answered_row(row: Mapping[str, Any], said: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A row of ``predict`` with what the model says of it.

    Args:
        row: as it was asked.
        said: the ``answer``, None where there is none; ``scores`` of the choices where it has any.
        names: what the columns of these are called.

    Raises:
        InputError: there is no answer.
    """
    if said["answer"] is None:
        raise InputError(f"the model's outputs are NaN for {dict(row)!r}: there is no answer; use other weights")
    return {**row, **{names[name]: value for name, value in said.items()}}
