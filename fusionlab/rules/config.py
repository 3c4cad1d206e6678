"""A rule from a configuration, and back: what a recipe, a flag or ``fusion.json`` says."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import PurePath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

from fusionlab import rules
from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.rules.base import LinearRule, Rule
from fusionlab.rules.by_tensor import ByTensor, LinearByTensor
from fusionlab.rules.checks import by_task
from fusionlab.rules.routed import RoutedMlps
from fusionlab.rules.settings import settings_in
from fusionlab.rules.task_known import AnyRule, TaskKnownRule

_BY_TASK = re.compile(r"(^|\| )Mapping\[str, float\]($| )")  # how a field says that it has one number or one a task


def from_config(config: str | Mapping[str, Any] | AnyRule | type) -> AnyRule:
    """The rule that ``config`` names: ``"metagpt"``, or ``{"class_path": ..., "init_args": {...}}``.

    ``class_path`` is a rule's name, the name of a class here, or the dotted path of a class that keeps the ``Rule``
    protocol. Arguments that are rules themselves are written the same way. A number may be a setting, which differs
    between tensors; see :class:`~fusionlab.rules.by_tensor.ByTensor`. A class stands for its name.

    Raises:
        InputError: no such rule, an unknown or missing argument, or an argument of the wrong type.

    Example:
        >>> from_config({"class_path": "metagpt", "init_args": {"scope": "layer"}})
        Metagpt(scope='layer', multiplier=1.0)
    """
    if isinstance(config, type):
        config = _path_of(config)
    if isinstance(config, Rule | TaskKnownRule | RoutedMlps):
        return _with_plain_numbers(config)
    if isinstance(config, str):
        config = {"class_path": config}
    if not isinstance(config, Mapping) or not isinstance(config.get("class_path"), str):
        raise InputError(f"rule: expected a name or {{class_path: ..., init_args: ...}}, got {config!r}.")
    unknown = [key for key in config if key not in ("class_path", "init_args")]
    if unknown:
        raise InputError(f"rule: unknown key {unknown[0]!r}; arguments of the rule belong under init_args.")
    rule_class = _find_class(config["class_path"])
    init_args = {} if config.get("init_args") is None else plain(config["init_args"])
    if not _has_settings(rule_class, init_args):
        rule: AnyRule = rule_class(**_arguments(rule_class, init_args))
        return rule
    if rule_class in known_task_known_rules().values():
        what = next(iter(dict(settings_in(init_args, rule_name(rule_class)))))
        raise InputError(f"{what}: expected one value for all tensors; this rule takes no other by tensor.")
    found = ByTensor(_path_of(rule_class), init_args)
    return LinearByTensor(found.class_path, found.init_args) if isinstance(found.sample, LinearRule) else found


def plain_rule(config: str | Mapping[str, Any] | AnyRule, where: str) -> Rule:
    """The rule that ``config`` names, where only one that makes one model of all tasks will do.

    Raises:
        InputError: as :func:`from_config`, or a rule that needs to know the task, with ``where`` it stands.
    """
    rule = from_config(config)
    if not isinstance(rule, Rule):
        raise InputError(f"{where}: {rule_name(rule)} makes a model for each task, not one of all; it stands alone.")
    return rule


def to_config(rule: AnyRule) -> dict[str, Any]:
    """The configuration that gives ``rule`` again, but for tensors that it carries.

    Example:
        >>> to_config(from_config("average"))
        {'class_path': 'fusionlab.rules.Average', 'init_args': {'weights': None}}
    """
    if isinstance(rule, ByTensor):
        return {"class_path": rule.class_path, "init_args": dict(rule.init_args)}
    path = _path_of(type(rule))
    values: dict[str, Any] = {}
    if is_dataclass(rule):
        values = {item.name: getattr(rule, item.name) for item in fields(rule) if item.metadata.get("told", True)}
    init_args = {name: to_config(value) if isinstance(value, Rule) else value for name, value in values.items()}
    return {"class_path": path, "init_args": init_args}


def plain(value: Any) -> Any:
    """``value`` as a file would have it: paths and dtypes by name, tuples and arrays as lists, numbers as Python's.

    Rules are their configurations, but for those that none gives again; whatever else stays as it is.

    Example:
        >>> plain({"sizes": (np.int64(2), 3), "output": PurePath("out"), "dtype": torch.bfloat16})
        {'sizes': [2, 3], 'output': 'out', 'dtype': 'bfloat16'}
    """
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, PurePath | torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    is_rule = isinstance(value, Rule | TaskKnownRule) and not isinstance(value, type)
    return plain(to_config(value)) if is_rule and _is_given_again(value) else value


def _is_given_again(rule: AnyRule) -> bool:
    """Whether its configuration gives the rule again, tensors that it carries included."""
    try:
        return from_config(to_config(rule)) == _with_plain_numbers(rule)
    except (ValueError, TypeError, RuntimeError):  # of tensors among its arguments too
        return False


def _with_plain_numbers(rule: AnyRule) -> AnyRule:
    """The rule with Python's numbers in the place of numpy's, which no file holds."""
    given = {item.name: getattr(rule, item.name) for item in fields(rule) if item.init} if is_dataclass(rule) else {}
    changed = {name: new for name, value in given.items() if (new := _numbers(value)) is not value}
    return replace(rule, **changed) if changed else rule  # type: ignore[type-var]


def _numbers(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Rule):
        return _with_plain_numbers(value)
    if not isinstance(value, Mapping):
        return value
    found = {key: _numbers(each) for key, each in value.items()}
    return found if any(found[key] is not value[key] for key in found) else value


def scale_of_base(rule: AnyRule) -> Any:
    """What the rule multiplies the whole model by, trained or not; 1.0 for rules that leave the base as it is.

    Example:
        >>> scale_of_base(from_config({"class_path": "passthrough", "init_args": {"scale": 0.5}}))
        0.5
        >>> scale_of_base(from_config("average"))
        1.0
    """
    if isinstance(inner := getattr(rule, "rule", None), Rule):
        return scale_of_base(inner)
    return to_config(rule)["init_args"].get("scale", 1.0) if rule_name(rule) == "passthrough" else 1.0


def check_tasks(rule: AnyRule, tasks: tuple[str, ...]) -> None:
    """Raise if a number of the rule, or of one inside, is given by task and not for these very tasks.

    Raises:
        InputError: naming what is missing or unknown.
    """
    rule = rule.sample if isinstance(rule, ByTensor) else rule
    for item in fields(rule) if is_dataclass(rule) and type(rule) in _every().values() else ():
        if _BY_TASK.search(str(item.type)):
            by_task(getattr(rule, item.name) or 0.0, tasks, f"{rule_name(rule)}.{item.name}")
    if isinstance(inner := getattr(rule, "rule", None), Rule):
        check_tasks(inner, tasks)


def rule_name(rule: AnyRule | type) -> str:
    """The snake case of the class, as configs write it.

    Example:
        >>> rule_name(from_config("TaskArithmetic"))
        'task_arithmetic'
    """
    if isinstance(rule, ByTensor):
        rule = _find_class(rule.class_path)
    name = (rule if isinstance(rule, type) else type(rule)).__name__
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def known_rules() -> dict[str, type]:
    """Every rule that ``fusionlab.rules`` exports and that makes one model of all tasks, by its name in a config."""
    return _exported("fuse")


def known_task_known_rules() -> dict[str, type]:
    """Those that make a model for each task, by name."""
    return _exported("unify")


def _exported(method: str) -> dict[str, type]:
    exported: list[type] = [getattr(rules, name) for name in rules.__all__]
    return {rule_name(item): item for item in exported if is_dataclass(item) and hasattr(item, method)}


def _every() -> dict[str, type]:
    return known_rules() | known_task_known_rules()


def _path_of(rule_class: type) -> str:
    module = "fusionlab.rules" if rule_class in _every().values() else rule_class.__module__
    return f"{module}.{rule_class.__qualname__}"


def _has_settings(rule_class: type, init_args: Any) -> bool:
    """Whether an argument, or one of a rule inside, is a setting where the rule takes no such value itself."""
    if not isinstance(init_args, Mapping):
        return False
    hints = get_type_hints(rule_class)
    given = {key: value for key, value in init_args.items() if not _fits(value, hints.get(key, Any))}
    return any(True for _ in settings_in(given, ""))


def _find_class(path: str) -> type:
    known = _every()
    by_class = {rule_class.__name__: rule_class for rule_class in known.values()}
    module_name, _, class_name = path.rpartition(".")
    if module_name in ("", "fusionlab.rules"):
        found = known.get(class_name) or by_class.get(class_name)
        if found is None:
            raise InputError(f"rule {path!r}: no such rule; {did_you_mean(class_name.lower(), known)}")
        return found
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"rule {path!r} cannot be imported: {error}") from error
    if found is RoutedMlps:
        return RoutedMlps
    makes = hasattr(found, "fuse") or all(hasattr(found, name) for name in ("unify", "masks", "scales"))
    if not isinstance(found, type) or not all(hasattr(found, name) for name in ("measure", "passes")) or not makes:
        raise InputError(f"rule {path!r} is not a fusion rule: it has no measure, fuse and passes.")
    if inspect.isabstract(found) or issubclass(found, ByTensor):
        raise InputError(f"rule {path!r} is what rules are made of; name one of them: {name_list(known)}.")
    return found


def _arguments(rule_class: type, init_args: Mapping[str, Any]) -> dict[str, Any]:
    name = rule_name(rule_class)
    if not isinstance(init_args, Mapping):
        raise InputError(f"{name}: init_args: expected a mapping, got {init_args!r}.")
    parameters = inspect.signature(rule_class).parameters
    hints = get_type_hints(rule_class)
    for key in init_args:
        if key not in parameters:
            raise InputError(f"{name}: unknown argument {key!r}; {did_you_mean(str(key), parameters)}")
    needed = [key for key, item in parameters.items() if item.default is item.empty and key not in init_args]
    if needed:
        raise InputError(f"{name}: init_args lacks {name_list(needed)}.")
    found = {key: _convert(f"{name}.{key}", value, hints.get(key, Any)) for key, value in init_args.items()}
    for key, value in found.items() if rule_class in _every().values() else ():
        numbers = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise InputError(f"{name}.{key}: expected finite numbers, got {value}.")
    return found


def _convert(what: str, value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` asks: nested rules are built, whole numbers become floats; anything else must fit."""
    if hint is Rule or Rule in get_args(hint):
        return None if value is None else plain_rule(value, what)
    if not _fits(value, hint):
        raise InputError(f"{what}: expected {_describe(hint)}, got {value!r}.")
    return float(value) if hint is float else value


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, arguments[0]) and _fits(item, arguments[1]) for key, item in value.items()
        )
    if hint in (float, int):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping to {_describe(arguments[1])}"
    return {float: "a number", int: "a whole number", str: "text", type(None): "null"}.get(hint, str(hint))
