"""Labels as class indices, the same in every split, whatever form and order the data has them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionlab.data.sources import Source
from fusionlab.errors import InputError, did_you_mean, name_list
from fusionlab.tasks import Task, check_duplicates

LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label")


@dataclass(frozen=True)
class Labels:
    """Class names in label order, and each split's labels, int64 of shape ``(rows,)``."""

    class_names: tuple[str, ...]
    by_split: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Column:
    """One split's label column: class names in the column's own order, or None for bare indices; index of each row."""

    names: tuple[str, ...] | None
    values: np.ndarray


def read_labels(source: Source, definition: Task | None, listed_as: str = "class_names") -> Labels:
    """Labels of every split, mapped by class name onto one order.

    The order is that of ``class_names``, else the alphabet, unless a ClassLabel feature has another: then it is the
    training split's, and classes that only another split has come after it. Bare indices, and class names that are
    numbers, count in ``class_names``, else in the classes of the known task of this name where their number agrees.

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
    numbered = {split: _numbers(column) for split, column in columns.items()}
    bare = [split for split, column in columns.items() if column.names is None]
    listed = task.class_names or _agreeing(definition, numbered.values())
    if listed and all(values is not None and not _is_named(task, columns[split]) for split, values in numbered.items()):
        names, by_split = listed, {split: values for split, values in numbered.items() if values is not None}
    elif bare:
        raise InputError(
            f"task {task.name!r}: the labels of {name_list(bare)} are integers without names; list the classes in "
            f"label order: {listed_as}: [...]"
        )
    else:
        names = _names(task, columns, listed_as)
        position = {name: index for index, name in enumerate(_own_names(task, columns, names))}
        by_split = {split: _mapped(task, split, column, position) for split, column in columns.items()}
    for split, values in by_split.items():
        _check_range(task, split, values, names)
    return Labels(names, by_split)


def find_column(task: Task, features: Mapping[str, Any], given: str | None, matching: list[str], what: str) -> str:
    """The given column, else the best of those that match.

    Args:
        task: the task, for messages.
        features: the table's columns.
        given: what the task says, or None.
        matching: columns that could be meant, best first.
        what: ``image`` or ``label``.

    Raises:
        InputError: there is no such column.
    """
    if given is not None:
        if given not in features:
            raise InputError(f"task {task.name!r} has no column {given!r} ({what}); {did_you_mean(given, features)}")
        return given
    if not matching:
        raise InputError(
            f"task {task.name!r}: none of its columns ({name_list(features)}) looks like the {what}; name it with "
            f"{what}_column: ..."
        )
    return matching[0]


def _column(task: Task, split: str, table: Any, hint: str | None) -> _Column:
    from datasets import ClassLabel, Value

    features = table.features
    matching = [hint] if hint is not None and hint in features else []
    matching += [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    matching += [name for name in LABEL_COLUMNS if name in features]
    name = find_column(task, features, task.label_column, matching, "label")
    feature, values = features[name], table[name][:]
    missing = sum(value is None for value in values)
    if missing:
        raise InputError(f"task {task.name!r}: {missing} of {len(values)} rows of {split} have no label in {name!r}")
    if isinstance(feature, ClassLabel):
        check_duplicates(feature.names, f"the class names of task {task.name!r} ({split})")
        return _Column(tuple(feature.names), np.array(values, np.int64))
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        names, indices = np.unique(np.array(values, dtype=object), return_inverse=True)
        return _Column(tuple(names), indices.astype(np.int64))
    if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "bool")):
        return _Column(None, np.array(values, np.int64))
    raise InputError(
        f"task {task.name!r}: column {name!r} holds neither class indices nor class names but {feature}; name another "
        f"with label_column: ..."
    )


def _numbers(column: _Column) -> np.ndarray | None:
    """The rows' class numbers where the labels are bare indices or names such as ``00012``, else None."""
    if column.names is None:
        return column.values
    if not all(name.isdecimal() for name in column.names):
        return None
    numbers = np.array([int(name) for name in column.names] + [-1], np.int64)
    return numbers[np.where(column.values < 0, -1, column.values)]


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
    if not missing or (len(missing) == len(found) == len(task.class_names)):
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
        f"(0..{len(names) - 1}); {len(bad)} of {len(values)} rows"
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
