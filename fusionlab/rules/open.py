"""Rules that leave a coefficient open: task arithmetic without one, by itself or inside transforms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fusionlab.rules.task_arithmetic import TaskArithmetic


def is_open(rule: Any) -> bool:
    """Whether the rule has no coefficient yet, and so needs a search or a default.

    Example:
        >>> from fusionlab.rules import Dare
        >>> is_open(Dare(TaskArithmetic())), is_open(TaskArithmetic(0.3))
        (True, False)
    """
    inner = _innermost(rule)
    return isinstance(inner, TaskArithmetic) and inner.scaling_coefficient is None


def with_coefficient(rule: Any, value: float) -> Any:
    """An open rule with ``value`` as its coefficient.

    Example:
        >>> with_coefficient(TaskArithmetic(), 0.3)
        TaskArithmetic(scaling_coefficient=0.3, by_name=None)
    """
    if isinstance(rule, TaskArithmetic):
        return replace(rule, scaling_coefficient=value)
    return replace(rule, rule=with_coefficient(rule.rule, value))


def coefficient_of(rule: Any) -> float:
    """The coefficient that :func:`with_coefficient` gave.

    Example:
        >>> coefficient_of(TaskArithmetic(0.3))
        0.3
    """
    inner = _innermost(rule)
    assert isinstance(inner, TaskArithmetic)
    assert isinstance(inner.scaling_coefficient, float)
    return inner.scaling_coefficient


def _innermost(rule: Any) -> Any:
    while not isinstance(rule, TaskArithmetic) and hasattr(rule, "rule"):
        rule = rule.rule
    return rule
