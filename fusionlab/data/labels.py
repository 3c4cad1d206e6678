"""Labels as class indices, the same in every split, whatever form and order the data has them in."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionlab.data.columns import find_column, label_candidates
from fusionlab.data.local import Source
from fusionlab.data.tasks import Task, check_duplicates
from fusionlab.errors import InputError, did_you_mean, name_list

_INTEGER = re.compile(r"\s*[+-]?\d{1,18}\s*")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """Labels as places in the class names.

    Args:
        class_names: the classes in label order.
        by_split: each split's labels, int64 of shape ``(rows,)``.
        column: the column that they are read from.
        place_of_name: place of each name that the column may hold.
        place_of_number: place of each number that it may hold.
    """

    class_names: tuple[str, ...]
    by_split: Mapping[str, np.ndarray]
    column: str
    place_of_name: Mapping[str, int]
    place_of_number: Mapping[int, int]

    def place(self, value: Any) -> int | None:
        """The place of a value of the column, as the data have it; None for no class."""
        if str(value) in self.place_of_name:
            return self.place_of_name[str(value)]
        number = int(value) if isinstance(value, int) else _number(str(value))
        return None if number is None else self.place_of_number.get(number)


@dataclass(frozen=True)
class _Column:
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


def read_labels(source: Source, definition: Task | None, listed_as: str = "class_names") -> Labels:
    """Labels of every split, mapped by class name onto one order.

    The order is that of ``class_names``, else the alphabet, unless a ClassLabel feature has another: then it is the
    training split's, and classes that only another split has come after it. Integers, also as text, are places in
    ``class_names``, from 0, or exactly as many values as it has, in their order; without it they are places in the
    classes of the known task of this name where their number agrees.

    Args:
        source: the task's tables.
        definition: the known task of this name, or None.
        listed_as: what the user knows ``class_names`` as, for messages.

    Raises:
        InputError: no label column, unknown or missing labels, classes without names or with one name twice.
    """
    task = source.task
    hint = None if definition is None else definition.label_column
    columns = {split: _column(task, split, table, hint) for split, table in source.tables.items()}
    if listed_as == "class_names":
        columns = _named(task, columns)
    numbered = {split: _numbers(column) for split, column in columns.items()}
    first = next(iter(columns.values()))
    place_of_name: Mapping[str, int] = {}
    listed = task.class_names or _agreeing(definition, numbered.values())
    places = {
        split: values
        for split, values in numbered.items()
        if values is not None and not _is_named(task, columns[split])
    }
    bare = [split for split in places if not columns[split].is_ordered]
    if listed and len(places) == len(columns):
        names = listed
        place_of_number = _placed(task, places, len(names), in_order=listed_as == "class_names")
        by_split = {split: _by_number(values, place_of_number) for split, values in places.items()}
    elif bare:
        raise InputError(
            f"task {task.name!r}: the labels of {name_list(bare)} are integers without names; list the classes in "
            f"label order: {listed_as}: [...]"
        )
    else:
        names = _names(task, columns, listed_as)
        position = {name: index for index, name in enumerate(_own_names(task, columns, names))}
        by_split = {split: _mapped(task, split, column, position) for split, column in columns.items()}
        place_of_name = position
        place_of_number = {index: position[name] for index, name in enumerate(first.names or ()) if first.is_ordered}
    for split, values in by_split.items():
        _check_range(task, split, values, names)
    return Labels(names, by_split, first.column, place_of_name, place_of_number)


def _column(task: Task, split: str, table: Any, hint: str | None) -> _Column:
    from datasets import ClassLabel, Value

    features = table.features
    name = find_column(task, features, task.label_column, label_candidates(features, hint), "label")
    feature, values = features[name], table[name][:]
    missing = [str(row) for row, value in enumerate(values) if value is None or not str(value).strip()]
    if missing:
        raise InputError(
            f"task {task.name!r}: {len(missing)} of {len(values)} rows of {split} have no label in {name!r}: rows "
            f"{name_list(missing)}, counted from 0"
        )
    if isinstance(feature, ClassLabel):
        check_duplicates(feature.names, f"the class names of task {task.name!r} ({split})")
        column = _Column(name, tuple(feature.names), np.array(values, np.int64), is_ordered=True)
        _check_range(task, split, column.values, column.names or ())
        return column
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        names, indices = np.unique(np.array(values, dtype=object), return_inverse=True)
        return _Column(name, tuple(names), indices.astype(np.int64))
    if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "bool")):
        return _Column(name, None, np.array(values, np.int64))
    raise InputError(
        f"task {task.name!r}: column {name!r} holds neither class indices nor class names but {feature}; name another "
        f"with label_column: ..."
    )


def _named(task: Task, columns: Mapping[str, _Column]) -> Mapping[str, _Column]:
    """Integers that are all names of listed classes, such as 1 of ``["1", "2"]``, as these names."""
    values = {int(value) for column in columns.values() if column.names is None for value in np.unique(column.values)}
    if not {str(value) for value in values} <= set(task.class_names or ()):
        return columns
    found = dict(columns)
    for split, column in columns.items():
        if column.names is None:
            names, indices = np.unique(column.values, return_inverse=True)
            found[split] = _Column(column.column, tuple(map(str, names.tolist())), indices.astype(np.int64))
    return found


def _numbers(column: _Column) -> np.ndarray | None:
    """The rows' class numbers where the labels are bare indices or names such as ``00012`` or ``true``, else None."""
    if column.names is None:
        return column.values
    found = [_number(name) for name in column.names]
    if any(number is None for number in found):
        return None
    return np.array(found, np.int64)[column.values]


def _number(name: str) -> int | None:
    if _INTEGER.fullmatch(name):
        return int(name)
    return {"false": 0, "true": 1}.get(name.casefold())


def _placed(task: Task, numbers: Mapping[str, np.ndarray], num_classes: int, *, in_order: bool) -> dict[int, int]:
    """Place of each number in the listed names: itself, or its rank where there are exactly as many numbers.

    Args:
        task: the task, for messages.
        numbers: of each split's rows.
        num_classes: number of listed names.
        in_order: whether the names are of classes, so that other integers, as many, are they in their order.
    """
    values = np.unique(np.concatenate(list(numbers.values()))).tolist()
    is_placed = not values or (values[0] >= 0 and values[-1] < num_classes)
    if not is_placed and in_order and len(values) == num_classes:
        return {value: place for place, value in enumerate(values)}
    if is_placed and values and values[0] > 0:
        _log.warning(
            "task %r: integer labels are places from 0, and no row is labelled 0; the labels are %s",
            *(task.name, name_list(map(str, values))),
        )
    return {place: place for place in range(num_classes)}


def _by_number(values: np.ndarray, place_of_number: Mapping[int, int]) -> np.ndarray:
    """The places of numbers; one that has none stays itself, which is out of range."""
    found, rows = np.unique(values, return_inverse=True)
    places = np.array([place_of_number.get(value, value) for value in found.tolist()], np.int64)
    return places[rows] if len(places) else values


def _agreeing(definition: Task | None, numbers: Iterable[np.ndarray | None]) -> tuple[str, ...] | None:
    """The known task's classes, if the data counts up to the last of them."""
    if definition is None or definition.class_names is None:
        return None
    last = max((int(values.max()) for values in numbers if values is not None and len(values)), default=-1)
    return definition.class_names if last + 1 == len(definition.class_names) else None


def _is_named(task: Task, column: _Column) -> bool:
    """Whether the column's own names are the listed ones, so that numbers among them are names."""
    return column.names is not None and set(column.names) <= set(task.class_names or ())


def _names(task: Task, columns: Mapping[str, _Column], listed_as: str) -> tuple[str, ...]:
    """What the classes are called, in label order."""
    found = _found(columns)
    if task.class_names is None:
        return found
    missing = [name for name in found if name not in task.class_names]
    is_ordered = all(column.is_ordered for column in columns.values())
    if not missing or (is_ordered and len(missing) == len(found) == len(task.class_names)):
        return task.class_names
    raise InputError(
        f"{listed_as} of task {task.name!r} ({len(task.class_names)} names) lacks {name_list(missing)} of the data's "
        f"{len(found)} classes; {did_you_mean(missing[0], task.class_names)}"
    )


def _own_names(task: Task, columns: Mapping[str, _Column], names: tuple[str, ...]) -> tuple[str, ...]:
    """What the data calls the classes in ``names``: other names are taken to rename the data's, place by place."""
    found = _found(columns)
    return names if set(found) <= set(names) else found


def _found(columns: Mapping[str, _Column]) -> tuple[str, ...]:
    """All class names: in alphabetical order if every split has them so, else those of the first split first."""
    lists = [column.names or () for column in columns.values()]
    found = tuple(dict.fromkeys(name for names in lists for name in names))
    return tuple(sorted(found)) if all(names == tuple(sorted(names)) for names in lists) else found


def _mapped(task: Task, split: str, column: _Column, position: Mapping[str, int]) -> np.ndarray:
    names = column.names or ()
    _check_range(task, split, column.values, names)
    return np.array([position[name] for name in names], np.int64)[column.values]


def _check_range(task: Task, split: str, values: np.ndarray, names: tuple[str, ...]) -> None:
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


def display_names(task: Task, names: tuple[str, ...], definition: Task | None) -> tuple[str, ...]:
    """Class names as prompts use them: aliases applied, underscores in other names read as spaces.

    Raises:
        InputError: an alias of no class, two classes with one name, or fewer than two classes.
    """
    aliases = task.class_aliases or {}
    if definition is None or aliases != definition.class_aliases:
        for alias in aliases:
            if alias not in names:
                raise InputError(
                    f"class_aliases of task {task.name!r}: no class {alias!r}; {did_you_mean(alias, names)}"
                )
    shown = tuple(aliases.get(name, name.replace("_", " ")) for name in names)
    check_duplicates(shown, f"the class names of task {task.name!r}")
    if len(shown) < 2:
        raise InputError(
            f"task {task.name!r} has {len(shown)} class ({name_list(shown)}); telling classes apart needs at least 2"
        )
    return shown
