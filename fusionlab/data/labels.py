"""Labels as class indices, the same in every split, whatever form and order the data has them in."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionlab.data.label_columns import (
    LabelColumn,
    as_listed,
    as_names,
    check_one_reading,
    check_range,
    label_columns,
    number_of,
    numbers_of,
    value_of,
)
from fusionlab.data.local import Source
from fusionlab.data.tasks import Task, check_duplicates
from fusionlab.errors import InputError, did_you_mean, name_list

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
        values = {value_of(name): place for name, place in self.place_of_name.items()}
        if value_of(str(value)) in values and len(values) == len(self.place_of_name):
            return values[value_of(str(value))]
        number = int(value) if isinstance(value, int) else number_of(str(value))
        return None if number is None else self.place_of_number.get(number)


def read_labels(source: Source, definition: Task | None, listed_as: str = "class_names") -> Labels:
    """Labels of every split, mapped by class name onto one order.

    The order is that of ``class_names``, else the alphabet, unless a ClassLabel feature has another: then it is the
    training split's, and classes that only another split has come after it. Integers, also as text, are the listed
    names where all of them are listed; else places in ``class_names``, from 0, or exactly as many values as it has, in
    their order; without it they are places in the classes of the known task of this name where their number agrees.
    Of ``label_words`` alone, which need not name classes, what both readings would give otherwise is refused.

    Args:
        source: the task's tables.
        definition: the known task of this name, or None.
        listed_as: what the user knows ``class_names`` as, for messages.

    Raises:
        InputError: no label column, unknown or missing labels, classes without names or with one name twice; integers
            that are label words by their names and by their places, not the same ones.
    """
    task = source.task
    hint = None if definition is None else definition.label_column
    columns = label_columns(task, source.tables, hint)
    if listed_as == "label_words":
        check_one_reading(task, columns)
    columns = as_listed(task, as_names(task, columns))
    numbered = {split: numbers_of(column) for split, column in columns.items()}
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
        if any(value_of(name)[0] == "truth" for column in columns.values() for name in column.names or ()):
            _log.warning("task %r: a label that is false is %r, true is %r", task.name, names[0], names[-1])
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
        check_range(task, split, values, names)
    return Labels(names, by_split, first.column, place_of_name, place_of_number)


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


def _is_named(task: Task, column: LabelColumn) -> bool:
    """Whether the column's own names are the listed ones, so that numbers among them are names."""
    return column.names is not None and set(column.names) <= set(task.class_names or ())


def _names(task: Task, columns: Mapping[str, LabelColumn], listed_as: str) -> tuple[str, ...]:
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


def _own_names(task: Task, columns: Mapping[str, LabelColumn], names: tuple[str, ...]) -> tuple[str, ...]:
    """What the data calls the classes in ``names``: other names are taken to rename the data's, place by place."""
    found = _found(columns)
    if set(found) <= set(names):
        return names
    renamed = name_list(f"{own} -> {name}" for own, name in zip(found, names, strict=True))
    _log.warning("task %r: the listed names rename the data's classes in their order: %s", task.name, renamed)
    return found


def _found(columns: Mapping[str, LabelColumn]) -> tuple[str, ...]:
    """All class names: in alphabetical order if every split has them so, else those of the first split first."""
    lists = [column.names or () for column in columns.values()]
    found = tuple(dict.fromkeys(name for names in lists for name in names))
    return tuple(sorted(found)) if all(names == tuple(sorted(names)) for names in lists) else found


def _mapped(task: Task, split: str, column: LabelColumn, position: Mapping[str, int]) -> np.ndarray:
    names = column.names or ()
    check_range(task, split, column.values, names)
    return np.array([position[name] for name in names], np.int64)[column.values]


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
