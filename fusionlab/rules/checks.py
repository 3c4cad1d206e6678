"""Checks of rule arguments that several rules share."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fusionlab.errors import InputError, did_you_mean, name_list


def by_task(value: float | Mapping[str, float], tasks: tuple[str, ...], what: str) -> dict[str, float]:
    """``value`` for every task: itself, or its entry.

    Raises:
        InputError: a mapping that lacks a task or names an unknown one, or a number that is not finite.

    Example:
        >>> by_task(0.3, ("a", "b"), "task_arithmetic.scaling_coefficient")
        {'a': 0.3, 'b': 0.3}
    """
    values = value.values() if isinstance(value, Mapping) else [value]
    if not all(math.isfinite(number) for number in values):
        raise InputError(f"{what}: expected finite numbers, got {value!r}.")
    if not isinstance(value, Mapping):
        return {task: float(value) for task in tasks}
    missing = [task for task in tasks if task not in value]
    unknown = [task for task in value if task not in tasks]
    if unknown:
        raise InputError(f"{what}: {name_list(unknown)}: no such task; {did_you_mean(unknown[0], tasks)}")
    if missing:
        raise InputError(f"{what} has no value for {name_list(missing)}; give one for each of {name_list(tasks, 40)}.")
    return {task: float(value[task]) for task in tasks}


def of_task(value: float | Mapping[str, float], task: str, what: str) -> float:
    """``value`` itself, or its entry for ``task``.

    Raises:
        InputError: the mapping has no such entry.
    """
    if not isinstance(value, Mapping):
        return value
    if task not in value:
        raise InputError(f"{what} has no value for {task!r}; it has {name_list(value)}.")
    return value[task]


def check_range(what: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise unless ``low <= value <= high`` (``low < value`` with ``open_low``).

    Raises:
        InputError: the value is outside.
    """
    if not (low < value if open_low else low <= value) or not value <= high:
        raise InputError(f"{what}: expected a number in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}.")


def check_transform(transform: object, rule: object) -> None:
    """Raise if ``rule`` is itself a transform of one that measures the task vectors as they were before.

    Raises:
        InputError: two transforms before such a rule: the inner one would hand it what the outer one left.
    """
    inner = getattr(rule, "rule", None)
    if getattr(inner, "measures_untransformed", False):
        names = [type(item).__name__ for item in (transform, rule, inner)]
        raise InputError(f"{names[0]} before {names[1]} before {names[2]}: use one transform before {names[2]}.")
