"""What happens to every parameter: fused, copied from the base, or one tensor under two names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.tensors.identity import Ties
from fusionlab.tensors.lazy import TaskInput, Weights

MismatchedTensors = Literal["error", "base"]
AVERAGED = (".running_mean", ".running_var")  # buffers, no parameters: a variance stays one as a mean of variances


@dataclass(frozen=True)
class Plan:
    """What happens to every parameter of the base.

    Args:
        model: every name of the model, of which the base may be a part.
        fused: the names the rule is applied to, in the base's order.
        averaged: running statistics of BatchNorm, whose mean over the inputs is taken whatever the rule is.
        copied: name -> why it is the base's own.
        aliases: name -> the fused or copied name that it is one tensor with.
        ignored: task -> names of its input that the base does not have and that are not used.
        sources: task -> name -> under which name its input holds it, where that differs.
    """

    model: tuple[str, ...]
    fused: tuple[str, ...]
    copied: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    averaged: tuple[str, ...] = ()


NO_TIES = Ties({}, {}, {})


def make_plan(
    base: Weights,
    inputs: Mapping[str, TaskInput],
    *,
    mismatched_tensors: MismatchedTensors = "error",
    model: Iterable[str] = (),
    ties: Ties = NO_TIES,
    is_ignored: Callable[[str], bool] = lambda name: False,
) -> Plan:
    """Decide for every parameter of ``base``; nothing is left out in silence.

    Floating-point parameters that every input holds in the base's shape are fused. Others keep the base's values:
    integer buffers that are equal everywhere, parameters no task vector touches, and, only with
    ``mismatched_tensors="base"``, those that differ in shape or are missing. A tensor under two names is fused once.

    Args:
        base: what fusion adds to.
        inputs: by task, in recipe order.
        mismatched_tensors: what to do with tensors that do not fit: an ``error``, or take the ``base``'s.
        model: the names of the whole model where ``base`` is part of it.
        ties: which names are one tensor.
        is_ignored: tells a name that loading ignores where the model has no such parameter; one that only some have is
            left as it is in the base.

    Raises:
        InputError: no inputs; or names, shapes or integer buffers differ and ``mismatched_tensors`` is ``"error"``.
    """
    if not inputs:
        raise InputError("there is nothing to fuse: give at least one fine-tuned model or adapter.")
    if mismatched_tensors not in ("error", "base"):
        raise InputError(f"mismatched_tensors: expected error or base, got {mismatched_tensors!r}.")
    aliases = {name: first for name, first in ties.first.items() if name in base.tensors}
    names = [name for name in base.tensors if name not in aliases]
    copied: dict[str, str] = {}
    ignored: dict[str, tuple[str, ...]] = {}
    sources = {task: _sources(names, ties, task_input) for task, task_input in inputs.items()}
    for task, task_input in inputs.items():
        left, extra = _left(base, names, task, task_input, sources[task], ties, is_ignored, mismatched_tensors)
        copied.update(left)
        if extra:
            ignored[task] = extra
    for name in names:
        if name not in copied and not base.tensors[name].dtype.is_floating_point:
            same = all(_same_integers(base, item, name, sources[task].get(name)) for task, item in inputs.items())
            copied[name] = "not floating point, equal everywhere" if same else "a counter: the base's own"
        elif name not in copied and not any(name in found for found in sources.values()):
            copied[name] = "no task vector touches it"
        elif name not in copied and base.tensors[name].numel == 0:
            copied[name] = "empty"
    averaged = tuple(name for name in names if name not in copied and name.endswith(AVERAGED))
    fused = tuple(name for name in names if name not in copied and name not in averaged)
    if not fused:
        raise InputError("no parameter is left to fuse: the inputs share none with the base.")
    return Plan(
        tuple(model) or tuple(base.tensors),
        fused,
        {name: copied[name] for name in names if name in copied},
        aliases,
        ignored,
        sources,
        averaged,
    )


def _left(
    base: Weights,
    names: Iterable[str],
    task: str,
    task_input: TaskInput,
    sources: Mapping[str, str],
    ties: Ties,
    is_ignored: Callable[[str], bool],
    mismatched_tensors: MismatchedTensors,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What one input leaves to the base, with the reason, and what it has that is not used.

    Raises:
        InputError: something does not fit, and ``mismatched_tensors`` is ``"error"``.
    """
    problems = _problems(base, names, task, task_input, sources)
    skipped = {name: "loading ignores it" for name in problems if is_ignored(name)}
    problems = {name: why for name, why in problems.items() if name not in skipped}
    extra = _extra(base, ties, task_input.weights)
    unknown = () if task_input.is_part else tuple(name for name in extra if not is_ignored(name))
    if (problems or unknown) and mismatched_tensors == "error":
        raise InputError(_mismatch_message(base, task, task_input, problems, unknown))
    return skipped | problems, extra


def _sources(names: Iterable[str], ties: Ties, task_input: TaskInput) -> dict[str, str]:
    """Name -> the name under which the input holds it; absent where it does not."""
    weights = task_input.weights
    if task_input.is_task_vector:
        return {name: name for name in names if name in weights.tensors}
    return {name: held for name in names if (held := ties.held_as(name, weights)) is not None}


def _extra(base: Weights, ties: Ties, weights: Weights) -> tuple[str, ...]:
    """Names that the base lacks, but for those tied to one that it has."""
    known = base.tensors
    return tuple(name for name in weights.tensors if name not in known and ties.first.get(name) not in known)


def _problems(
    base: Weights, names: Iterable[str], task: str, task_input: TaskInput, sources: Mapping[str, str]
) -> dict[str, str]:
    """Name -> what keeps it from being fused, for one input."""
    found = {}
    for name in names:
        if name not in sources:
            if not (task_input.is_task_vector or task_input.is_part):
                found[name] = f"missing in {task!r}"
            continue
        expected, got = base.tensors[name], task_input.weights.tensors[sources[name]]
        if got.shape != expected.shape:
            found[name] = f"shape {got.shape} in {task!r} (expected {expected.shape})"
        elif got.dtype.is_floating_point != expected.dtype.is_floating_point:
            found[name] = f"dtype {got.dtype} in {task!r} (expected {expected.dtype})"
        elif expected.numel > 1 and not _same_integers(base, task_input, name, sources[name]):
            found[name] = f"an integer buffer with other values in {task!r}"
    return found


def _same_integers(base: Weights, task_input: TaskInput, name: str, source: str | None) -> bool:
    if source is None or base.tensors[name].dtype.is_floating_point:
        return True
    values = task_input.weights.read(source)
    return not values.any() if task_input.is_task_vector else torch.equal(base.read(name).to(values.dtype), values)


def _mismatch_message(
    base: Weights, task: str, task_input: TaskInput, problems: Mapping[str, str], extra: tuple[str, ...]
) -> str:
    what = "the task vector of" if task_input.is_task_vector else "fine-tuned"
    message = f"{what} {task!r} does not fit the base"
    if problems:
        message += f": {name_list(f'{name}: {why}' for name, why in problems.items())}"
    if extra:
        unused = [name for name in base.tensors if name not in task_input.weights.tensors]
        message += f"; not in the base: {name_list(extra)} ({did_you_mean(extra[0], unused or list(base.tensors))})"
    return (
        f"{message}. Use models made from the same base, "
        "or say mismatched_tensors: base to take these tensors from the base."
    )
