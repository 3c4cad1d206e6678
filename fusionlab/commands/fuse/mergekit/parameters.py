"""Parameters of a mergekit configuration as numbers and settings of a rule."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fusionlab.commands.fuse.mergekit.models import Inputs, Slice, refuse_unknown
from fusionlab.errors import InputError

_WITHOUT_EFFECT = ("int8_mask",)
_WILDCARDS = "*?["
_NUMBER = re.compile(r"(^|\.)\d+(\.|$)")  # a part of a name that is a number, as of a block


class Parameters:
    """A parameter by task: that of the model, else that for all, else mergekit's default.

    Args:
        method: the merge method.
        defaults: its parameters, with their defaults; None: it must be given.
        inputs: the models with what is given for them.

    Raises:
        InputError: a parameter that the method has not.
    """

    def __init__(self, method: str, defaults: Mapping[str, Any], inputs: Inputs) -> None:
        self.method, self.defaults, self.inputs = method, defaults, inputs
        known = (*defaults, *_WITHOUT_EFFECT)
        refuse_unknown(inputs.shared, known, "parameters")
        for each in inputs.slices:
            refuse_unknown(each.shared, known, "parameters of a slice")
            for task, own in each.own.items():
                refuse_unknown(own, known, f"parameters of {task!r}")

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order of the configuration."""
        return list(self.inputs.models)

    def single(self, name: str) -> Any:
        """A parameter that has one value for all models and tensors.

        Raises:
            InputError: it has several.
        """
        value = self.inputs.shared.get(name, self.defaults[name])
        if any(name in each.shared for each in self.inputs.slices):
            raise InputError(
                f"{name} in parameters of a slice: one value for all tensors is expected; give it for all."
            )
        if isinstance(value, (list, Mapping)):
            raise InputError(
                f"parameters.{name}: one value for all tensors is expected, not gradients or filters, got {value!r}."
            )
        return value

    def number(self, name: str) -> float:
        """A parameter that is one number.

        Raises:
            InputError: it is none, or differs between tensors.
        """
        return _one(self.single(name), f"parameters.{name}")

    def switch(self, name: str) -> bool:
        """A parameter that is true or false.

        Raises:
            InputError: it is neither, or differs between tensors.
        """
        value = self.single(name)
        if not isinstance(value, bool):
            raise InputError(f"parameters.{name}: expected true or false, got {value!r}.")
        return value

    def setting(self, name: str, task: str | None = None) -> Any:
        """A number, or what a rule takes in its place for one that differs between tensors.

        Raises:
            InputError: it is missing, or no number.
        """
        where = f"parameters.{name}" + (f" of {task!r}" if task else "")
        chains = [self._chain(name, task, each, where) for each in self.inputs.slices]
        plain = chains[0][0]
        is_plain = "filter" not in plain and not isinstance(plain["value"], list)
        if is_plain and all(chain == [plain] for chain in chains):
            return plain["value"]
        if len(chains) == 1:
            return chains[0] if "filter" in chains[0][0] else chains[0][0]["value"]
        inside = zip(chains, self.inputs.slices, strict=True)
        lines = [line | {"layers": list(each.layers or ())} for chain, each in inside for line in chain]
        for where_else, chain in (("before", chains[0]), ("after", chains[-1])):
            lines += [line | {"layers": where_else, "value": _first(line["value"])} for line in chain]
        return lines

    def _chain(self, name: str, task: str | None, of: Slice, where: str) -> list[dict[str, Any]]:
        """What holds in a slice, the first that matches counting."""
        scopes = (of.own[task] if task else {}, of.shared, self.inputs.shared)
        lines = list(_lines((scope[name] for scope in scopes if name in scope), where))
        numbered = [line["filter"] for line in lines if _NUMBER.search(line.get("filter", ""))]
        if task in of.moved and numbered:
            raise InputError(
                f"{where}: filter {numbered[0]!r}: mergekit looks for the block's number in the model, which is "
                "another one in the result; give that block a slice of its own."
            )
        if not lines or "filter" in lines[-1]:
            if self.defaults[name] is not None:
                lines.append({"value": self.defaults[name]})
            elif not lines:
                raise InputError(f"{where} is missing; {self.method} needs it.")
        return lines

    def settings(self, name: str) -> dict[str, Any]:
        """The same of every task."""
        return {task: self.setting(name, task) for task in self.tasks}


def _lines(given: Iterable[Any], where: str) -> Iterable[dict[str, Any]]:
    """What is given, from the first scope that counts to the last, up to a value that is for every tensor."""
    for value in given:
        conditions = value if isinstance(value, list) and any(isinstance(each, Mapping) for each in value) else [value]
        for condition in conditions:
            line = condition if isinstance(condition, Mapping) else {"value": condition}
            refuse_unknown(line, ("filter", "value"), where)
            pattern, number = line.get("filter"), _number(line["value"], where)
            if pattern in (None, "*"):
                yield {"value": number}
                return
            if any(letter in pattern for letter in _WILDCARDS):
                raise InputError(
                    f"{where}: filter {pattern!r}: mergekit compares plain text; leave out {_WILDCARDS!r}."
                )
            yield {"filter": pattern, "value": number}


def _first(value: float | list[float]) -> float:
    return value[0] if isinstance(value, list) else value


def _number(value: Any, where: str) -> float | list[float]:
    if isinstance(value, list) and value:
        return [_one(each, where) for each in value]
    return _one(value, where)


def _one(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: expected a number, got {value!r}.") from error
