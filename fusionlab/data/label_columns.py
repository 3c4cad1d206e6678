"""The label column of each split: what its values are, and what they say in whatever spelling."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusionlab.data.columns import column_of, find_column, label_candidates
from fusionlab.data.tasks import Task, check_duplicates
from fusionlab.errors import InputError, name_list

_INTEGER = re.compile(r"\s*[+-]?\d{1,18}\s*")
_PLAIN_INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")


@dataclass(frozen=True)
class LabelColumn:
    """One split's label column.

    Args:
        column: its name.
        names: class names in the column's own order, or None for bare indices.
        values: index of each row.
        is_ordered: whether the data itself puts the names in an order.
    """

    column: str
    names: tuple[str, ...] | None
    values: np.ndarray
    is_ordered: bool = False


def label_columns(task: Task, tables: Mapping[str, Any], hint: str | None) -> dict[str, LabelColumn]:
    """Each split's label column: training's in all that have a column of its name."""

    def find(features: Mapping[str, Any]) -> str:
        return find_column(task, features, task.label_column, label_candidates(features, hint), "label")

    return {split: _column(task, split, table, column_of(tables, split, find)) for split, table in tables.items()}


def _column(task: Task, split: str, table: Any, name: str) -> LabelColumn:
    from datasets import ClassLabel, Value

    feature, values = table.features[name], table[name][:]
    missing = [str(row) for row, value in enumerate(values) if value is None or not str(value).strip()]
    if missing:
        raise InputError(
            f"task {task.name!r}: {len(missing)} of {len(values)} rows of {split} have no label in {name!r}: rows "
            f"{name_list(missing)}, counted from 0"
        )
    if isinstance(feature, ClassLabel):
        check_duplicates(feature.names, f"the class names of task {task.name!r} ({split})")
        column = LabelColumn(name, tuple(feature.names), np.array(values, np.int64), is_ordered=True)
        check_range(task, split, column.values, column.names or ())
        return column
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return _texts(name, [value.strip() for value in values])
    if isinstance(feature, Value) and feature.dtype == "bool":
        return _texts(name, list(map(str, values)))
    if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint")):
        return LabelColumn(name, None, np.array(values, np.int64))
    raise InputError(
        f"task {task.name!r}: column {name!r} holds neither class indices nor class names but {feature}; name another "
        f"with label_column: ..."
    )


def _texts(name: str, values: list[str]) -> LabelColumn:
    names, indices = np.unique(np.array(values, dtype=object), return_inverse=True)
    return LabelColumn(name, tuple(names), indices.astype(np.int64))


def as_listed(task: Task, columns: Mapping[str, LabelColumn]) -> Mapping[str, LabelColumn]:
    """Labels that are listed names in another spelling, such as ``True`` for ``true`` or ``01`` for ``1``, as these."""
    listed = {value_of(name): name for name in task.class_names or ()}
    every = {name for column in columns.values() for name in column.names or ()}
    if (
        len(listed) < len(task.class_names or ())
        or any(column.names is None for column in columns.values())
        or not {value_of(name) for name in every} <= set(listed)
    ):
        return columns
    return {
        split: replace(column, names=tuple(listed[value_of(name)] for name in column.names or ()))
        for split, column in columns.items()
    }


def value_of(name: str) -> tuple[str, Any]:
    """What a label says, whichever way it is written: a number, true or false, or the text itself."""
    text = name.strip()
    if _INTEGER.fullmatch(text):
        return "number", int(text)
    return ("truth", text.casefold()) if text.casefold() in ("false", "true") else ("text", text)


def as_names(task: Task, columns: Mapping[str, LabelColumn]) -> Mapping[str, LabelColumn]:
    """Integers that are all listed, such as 1 of ``["1", "2"]``, as these names: what their text in a csv file is."""
    values = {int(value) for column in columns.values() if column.names is None for value in np.unique(column.values)}
    if not {("number", value) for value in values} <= set(map(value_of, task.class_names or ())):
        return columns
    found = dict(columns)
    for split, column in columns.items():
        if column.names is None:
            names, indices = np.unique(column.values, return_inverse=True)
            found[split] = LabelColumn(column.column, tuple(map(str, names.tolist())), indices.astype(np.int64))
    return found


def check_one_reading(task: Task, columns: Mapping[str, LabelColumn]) -> None:
    """Raise where plain integers are all label words, and all places of label words, and the two differ.

    The same table is integers in parquet and text in csv, so that its format tells nothing of what is meant.

    Raises:
        InputError: with both readings.
    """
    words = task.class_names or ()
    place_of = {value_of(word): place for place, word in enumerate(words)}
    found = {_plain_integer(name) for column in columns.values() for name in _unordered_names(column)}
    values = sorted(value for value in found if value is not None)
    both = None not in found and all(("number", value) in place_of and 0 <= value < len(words) for value in values)
    value = next((value for value in values if both and place_of["number", value] != value), None)
    if value is None:
        return
    meant = ", ".join(str(value_of(word)[1]) for word in words)
    raise InputError(
        f"task {task.name!r}: label {value} is the label word {words[place_of['number', value]]!r} by its name, and "
        f"{words[value]!r} by its place from 0 in label_words; say what the classes are called in the data, in the "
        f"order of label_words: class_names: [{meant}] where labels are the words themselves, "
        f"[{', '.join(map(str, range(len(words))))}] where they are places"
    )


def _unordered_names(column: LabelColumn) -> tuple[str, ...]:
    """The names of a column, integers as their text; of a ClassLabel, which says itself what they are, none."""
    if column.is_ordered:
        return ("",)
    return tuple(map(str, np.unique(column.values).tolist())) if column.names is None else column.names


def _plain_integer(name: str) -> int | None:
    """The integer that a text is, written as integers are; one such as ``01`` is a name."""
    return int(name) if _PLAIN_INTEGER.fullmatch(name) else None


def numbers_of(column: LabelColumn) -> np.ndarray | None:
    """The rows' class numbers where the labels are bare indices or names such as ``00012`` or ``true``, else None."""
    if column.names is None:
        return column.values
    found = [number_of(name) for name in column.names]
    if any(number is None for number in found):
        return None
    return np.array(found, np.int64)[column.values]


def number_of(name: str) -> int | None:
    """The class number that a label is, 0 or 1 where it is a truth; None for any other text."""
    kind, value = value_of(name)
    return {"number": value, "truth": int(value == "true")}.get(kind)


def check_range(task: Task, split: str, values: np.ndarray, names: tuple[str, ...]) -> None:
    """Raise for labels that are no places in ``names``.

    Args:
        task: the task, for messages.
        split: theirs.
        values: int64, of each row.
        names: the classes.

    Raises:
        InputError: how many, and what they are.
    """
    bad = values[(values < 0) | (values >= len(names))]
    if not len(bad):
        return
    if (bad == -1).all():
        raise InputError(
            f"task {task.name!r}: label -1, which stands for none, in {len(bad)} of {len(values)} rows of {split}; "
            f"remove them, or name another split with {split}: ..."
        )
    raise InputError(
        f"task {task.name!r}: label {bad[bad != -1][0]} of {split} is out of range, the task has {len(names)} classes "
        f"(0..{len(names) - 1}); {len(bad)} of {len(values)} rows. Integers are places from 0 in the classes, or with "
        f"class_names exactly as many values as it has, in their order"
    )
