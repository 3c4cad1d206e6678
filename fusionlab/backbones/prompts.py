"""Prompts that a text tower cannot tell apart, or that are longer than it reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from fusionlab.errors import InputError, name_list

_SHOWN = 60
_log = logging.getLogger(__name__)


def prompts_of(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template with every class name in the place of ``{}``, class by class."""
    return [template.replace("{}", name) for name in class_names for template in templates]


def check_prompts(
    class_names: Sequence[str],
    prompts: Sequence[str],
    tokens: Sequence[Sequence[int]],
    is_cut: Sequence[bool],
    limit: int,
    task: str | None,
) -> None:
    """Raise if two classes are one to the text tower, and log which prompts it reads in part only.

    Args:
        class_names: the classes in label order.
        prompts: each class's prompts, class by class.
        tokens: of each prompt, as the tower reads them.
        is_cut: whether a prompt had more.
        limit: number of tokens that the tower reads.
        task: name of the task, for messages.

    Raises:
        InputError: all prompts of two classes are the same tokens; the message has both names.
    """
    of_task = f" of task {task!r}" if task else ""
    each = len(prompts) // len(class_names)
    seen: dict[tuple[tuple[int, ...], ...], int] = {}
    for index, name in enumerate(class_names):
        rows = range(index * each, (index + 1) * each)
        other = seen.setdefault(tuple(sorted(tuple(tokens[row]) for row in rows)), index)
        if other == index:
            continue
        why = "have the same prompts"
        if any(is_cut[row] for row in rows):
            why = f"have the same prompts once these are cut to the {limit} tokens that the model reads"
        raise InputError(
            f"the classes {class_names[other]!r} and {name!r}{of_task} {why}, such as {_short(prompts[rows[0]])}: they "
            f"could not be told apart; give other class names (class_aliases, class_names) or shorter templates"
        )
    cut = [_short(prompt) for prompt, is_longer in zip(prompts, is_cut, strict=True) if is_longer]
    if cut:
        _log.warning(
            "%d of %d prompts%s are longer than the %d tokens that the model reads and were cut: %s",
            *(len(cut), len(prompts), of_task, limit, name_list(cut)),
        )


def check_rows(head: Tensor, class_names: Sequence[str], task: str | None) -> None:
    """Raise if two rows of a head are equal, bit for bit, though their prompts are not.

    Raises:
        InputError: naming both classes.
    """
    _, row_of = torch.unique(head, dim=0, return_inverse=True)
    seen: dict[int, str] = {}
    for row, name in zip(row_of.tolist(), class_names, strict=True):
        other = seen.setdefault(row, name)
        if other != name:
            of_task = f" of task {task!r}" if task else ""
            raise InputError(
                f"the text tower gives the classes {other!r} and {name!r}{of_task} the same features, though their "
                f"prompts differ; does eos_token_id of its configuration fit its tokenizer?"
            )


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
