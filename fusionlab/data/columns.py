"""Which column of a table is meant where the task does not say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusionlab.data.tasks import Task
from fusionlab.errors import InputError, did_you_mean, name_list

_LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label")


def find_column(
    task: Task, features: Mapping[str, Any], given: str | None, candidates: Sequence[Sequence[str]], what: str
) -> str:
    """The given column, else the one of the best candidates.

    Args:
        task: the task, for messages.
        features: the table's columns.
        given: what the task says, or None.
        candidates: columns that could be meant, in groups, best first; the first group that is not empty decides.
        what: ``image`` or ``label``.

    Raises:
        InputError: there is no such column, or several that are equally good.
    """
    if given is not None:
        if given not in features:
            raise InputError(f"task {task.name!r} has no column {given!r} ({what}); {did_you_mean(given, features)}")
        return given
    best = next((group for group in candidates if group), ())
    if not best:
        raise InputError(
            f"task {task.name!r}: none of its columns ({name_list(features)}) looks like the {what}; name it with "
            f"{what}_column: ..."
        )
    if len(best) > 1:
        named = name_list(best)
        raise InputError(f"task {task.name!r}: any of {named} may be the {what}; name it with {what}_column: ...")
    return best[0]


def column_of(tables: Mapping[str, Any], split: str, find: Callable[[Mapping[str, Any]], str]) -> str:
    """The column of a split that ``find`` finds among training's, where the split has it; else among its own.

    Args:
        tables: by split.
        split: one of them.
        find: the column among a table's features.
    """
    own = tables[split].features
    trained = find(tables["train"].features) if "train" in tables else None
    return trained if trained in own else find(own)


def label_candidates(features: Mapping[str, Any], hint: str | None) -> list[list[str]]:
    """Columns that could be the label, in groups: the known task's, ``label``, those with classes, those so called."""
    from datasets import ClassLabel

    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    dtype = str(getattr(features.get("label"), "dtype", ""))
    is_label = "label" in classes or dtype.removeprefix("large_").startswith(("string", "int", "uint", "bool"))
    known = [name for name in _LABEL_COLUMNS if name in features]
    return [
        [hint] if hint is not None and hint in features else [],
        ["label"] if is_label else [],
        [name for name in classes if name in known],
        classes,
        known,
    ]
