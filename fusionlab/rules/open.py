"""Rules with other arguments, and those that leave a coefficient open: task arithmetic without one, or around it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from fusionlab.rules.base import Rule
from fusionlab.rules.by_tensor import ByTensor
from fusionlab.rules.config import from_config, to_config
from fusionlab.rules.task_arithmetic import TaskArithmetic


def is_open(rule: Any) -> bool:
    """Whether it is a rule without a coefficient yet, which needs a search or a default; a search is none.

    Example:
        >>> from fusionlab.rules import Dare
        >>> is_open(Dare(TaskArithmetic())), is_open(TaskArithmetic(0.3))
        (True, False)
    """
    inner = _innermost(rule)
    return isinstance(rule, Rule) and isinstance(inner, TaskArithmetic) and inner.scaling_coefficient is None


def with_argument(rule: Any, name: str, value: Any) -> Any:
    """The rule with another value of an argument, its own or that of a rule inside.

    Raises:
        LookupError: neither has such an argument.

    Example:
        >>> from fusionlab.rules import Dare
        >>> with_argument(Dare(TaskArithmetic(0.3), drop_rate=0.5), "drop_rate", 0.1).drop_rate
        0.1
    """
    of: Any = rule.sample if isinstance(rule, ByTensor) else rule
    names = [item.name for item in fields(of)]
    if name not in names and "rule" not in names:
        raise LookupError(f"{type(rule).__name__} has no argument {name!r}; it has {', '.join(names) or 'none'}")
    changed = {name: value} if name in names else {"rule": with_argument(rule.rule, name, value)}
    if not isinstance(rule, ByTensor):
        return replace(rule, **changed)
    plain = {key: to_config(each) if isinstance(each, Rule) else each for key, each in changed.items()}
    return from_config({"class_path": rule.class_path, "init_args": {**rule.init_args, **plain}})


def with_coefficient(rule: Any, value: float) -> Any:
    """The rule with ``value`` as its scaling coefficient, or that of the rule inside.

    Raises:
        LookupError: it has none.

    Example:
        >>> with_coefficient(TaskArithmetic(), 0.3)
        TaskArithmetic(scaling_coefficient=0.3, by_name=None)
    """
    return with_argument(rule, "scaling_coefficient", value)


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
