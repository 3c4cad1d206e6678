"""Values that differ between the tensors of a model: chosen by a filter on the name, and changing along its blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from fusionlab.errors import InputError, did_you_mean

_BLOCK = re.compile(r"^(?P<stack>(?:.*?\.)?)(?P<index>\d+)\.")
_KEYS = ("filter", "layers", "value")
_BEFORE = ("embed", "wte", "wpe")  # in names of what comes before the blocks


@dataclass(frozen=True)
class Entry:
    """One line of a setting: what it is for, and the value there.

    Args:
        values: one number, or several to interpolate between over the blocks, the first for what is outside of them.
        pattern: a part of the name, or with ``*``, ``?`` or ``[`` a shell-style pattern for all of it; empty: any name.
        layers: the first block and the one after the last that it is for; ``before`` for embeddings, ``after`` for what
            else is outside of the blocks; None: everything.
    """

    values: tuple[float, ...]
    pattern: str = ""
    layers: tuple[int, int] | Literal["before", "after"] | None = None

    def matches(self, name: str, block: tuple[int, int] | None) -> bool:
        """Whether it is for the parameter ``name`` of the block ``(index, number of blocks)``, None outside of all."""
        if isinstance(self.layers, str):
            if block is not None or comes_before_blocks(name) != (self.layers == "before"):
                return False
        elif self.layers is not None and (block is None or not self.layers[0] <= block[0] < self.layers[1]):
            return False
        if any(letter in self.pattern for letter in "*?["):
            return fnmatchcase(name, self.pattern)
        return self.pattern in name

    def at(self, block: tuple[int, int] | None) -> float:
        """The value there: linear between the values spread evenly over the blocks; the last for a lone block."""
        if len(self.values) == 1 or block is None:
            return self.values[0]
        first, end = self.layers if isinstance(self.layers, tuple) else (0, block[1])
        depth = (block[0] - first) / (end - first - 1) if end - first > 1 else 1.0
        place = depth * (len(self.values) - 1)
        lower = int(place)
        share = place - lower
        return (1 - share) * self.values[lower] + share * self.values[min(lower + 1, len(self.values) - 1)]


def is_setting(value: Any) -> bool:
    """Whether ``value`` is written as one that differs between tensors: a list, or a mapping with a ``value``.

    Example:
        >>> is_setting([0, 0.5]), is_setting({"filter": "mlp", "value": 1}), is_setting({"a": 1}), is_setting(0.5)
        (True, True, False, False)
    """
    return isinstance(value, list) or (isinstance(value, Mapping) and "value" in value and set(value) <= set(_KEYS))


def entries(setting: Any, what: str) -> tuple[Entry, ...]:
    """The lines of a setting; the first that matches a tensor gives its value.

    Args:
        setting: a number, a list of them, ``{filter: PATTERN, layers: [FIRST, END], value: number or list}`` of which
            only ``value`` is needed (``layers`` may also be ``before`` or ``after``), or a list of those.
        what: the argument, for messages.

    Raises:
        InputError: it is none of them.

    Example:
        >>> entries([{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}], "slerp.t")
        (Entry(values=(0.0, 1.0), pattern='mlp', layers=None), Entry(values=(0.5,), pattern='', layers=None))
    """
    if isinstance(setting, list) and any(isinstance(line, Mapping) for line in setting):
        return tuple(_entry(line, what) for line in setting)
    return (_entry(setting if isinstance(setting, Mapping) else {"value": setting}, what),)


def _entry(line: Any, what: str) -> Entry:
    if not isinstance(line, Mapping):
        raise InputError(f"{what}: expected {{filter: PATTERN, value: number or list}}, got {line!r}.")
    if unknown := [key for key in line if key not in _KEYS]:
        raise InputError(f"{what}: unknown key {unknown[0]!r}; {did_you_mean(str(unknown[0]), _KEYS)}")
    values = line.get("value")
    values = values if isinstance(values, list) else [values]
    if not values or not all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in values):
        raise InputError(f"{what}: value: expected a number or a list of numbers, got {line.get('value')!r}.")
    pattern, layers = line.get("filter") or "", line.get("layers")
    if not isinstance(pattern, str):
        raise InputError(f"{what}: filter: expected a part of a parameter's name, got {pattern!r}.")
    if layers is None or layers == "before" or layers == "after":
        return Entry(tuple(map(float, values)), pattern, layers)
    if not _is_range(layers):
        raise InputError(
            f"{what}: layers: expected the first block and the one after the last, before or after, got {layers!r}."
        )
    return Entry(tuple(map(float, values)), pattern, (layers[0], layers[1]))


def _is_range(layers: Any) -> bool:
    numbers = isinstance(layers, Sequence) and len(layers) == 2 and all(type(each) is int for each in layers)
    return numbers and 0 <= layers[0] < layers[1]


def comes_before_blocks(name: str) -> bool:
    """Whether a parameter outside of the blocks is of the embeddings, by its name.

    Example:
        >>> comes_before_blocks("model.embed_tokens.weight"), comes_before_blocks("model.norm.weight")
        (True, False)
    """
    return any(each in name for each in _BEFORE)


def stack_and_index(name: str) -> tuple[str, int] | None:
    """The stack and the index of the block that a parameter is in, None outside of all.

    Example:
        >>> stack_and_index("model.layers.3.mlp.weight"), stack_and_index("lm_head.weight")
        (('model.layers.', 3), None)
    """
    match = _BLOCK.match(name)
    return None if match is None else (match["stack"], int(match["index"]))


def blocks_of(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The index of the block that a name is in and the number of blocks of its stack, for every name inside one.

    A block is numbered by the first number in a name; each stack (vision and text, encoder and decoder) by itself.

    Example:
        >>> blocks_of(("layers.0.w", "layers.2.w", "head.w"))
        {'layers.0.w': (0, 3), 'layers.2.w': (2, 3)}
    """
    found = {name: place for name in names if (place := stack_and_index(name))}
    last: dict[str, int] = {}
    for stack, index in found.values():
        last[stack] = max(last.get(stack, 0), index)
    return {name: (index, last[stack] + 1) for name, (stack, index) in found.items()}


def value_at(setting: Any, name: str, block: tuple[int, int] | None, what: str) -> float:
    """The value of a setting for one parameter.

    Raises:
        InputError: no line of it matches.
    """
    for entry in entries(setting, what):
        if entry.matches(name, block):
            return entry.at(block)
    raise InputError(f"{what} has no value for {name}; add one for the others, as {{value: NUMBER}} at the end.")


def settings_in(value: Any, what: str) -> Iterator[tuple[str, Any]]:
    """Every setting in the arguments of a rule, nested ones and those of single tasks included, and what it is of."""
    if is_setting(value):
        yield what, value
    elif isinstance(value, Mapping):
        inner = value["init_args"] if "class_path" in value and "init_args" in value else value
        for key, each in (inner or {}).items():
            yield from settings_in(each, f"{what}.{key}")


def with_values(value: Any, choose: Callable[[str, Any], float], what: str) -> Any:
    """``value`` with ``choose(what, setting)`` in the place of every setting in it."""
    if is_setting(value):
        return choose(what, value)
    if not isinstance(value, Mapping):
        return value
    if "class_path" in value and "init_args" in value:
        return {**value, "init_args": with_values(value["init_args"] or {}, choose, what)}
    return {key: with_values(each, choose, f"{what}.{key}") for key, each in value.items()}
