"""The rows of a task of instruction data that lies on the hub or in local files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusionlab.data.chat.rows import FORMATS, find_format
from fusionlab.data.sources import open_source, remainder, split_rows
from fusionlab.errors import InputError, name_list
from fusionlab.tasks import Task

_INPUTS = {"completion": ("prompt",), "instruction": ("instruction", "input"), "text": ("text",)}


class ChatSource:
    """The rows of a task by split.

    Args:
        task: the task, completed.
        cache: folder in which local tables are prepared.

    Raises:
        InputError: the data cannot be read, or its columns are those of no format.
    """

    def __init__(self, task: Task, cache: Path) -> None:
        self.task, self.source = task, open_source(task, cache)
        columns = {name: table.column_names for name, table in self.source.tables.items()}
        kinds = {name: find_format(found) for name, found in columns.items()}
        self.kind = next(iter(kinds.values()))
        if self.kind is None:
            wanted = "; ".join(" + ".join(needed) for needed in FORMATS.values())
            raise InputError(
                f"task {task.name!r}: its columns ({name_list(next(iter(columns.values())), 12)}) are those of no "
                f"format: {wanted}; rename them, or give input_columns and label_words for a ranked task"
            )
        if len(set(kinds.values())) > 1:
            raise InputError(
                f"task {task.name!r}: its splits have different formats: "
                + ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            )

    def rows(self, split: str) -> tuple[Any, np.ndarray]:
        """The table that holds a split, and the split's rows in it; one that the data lacks is carved out of training.

        Raises:
            InputError: there is neither the split nor a training split, or it is empty.
        """
        available = tuple(self.source.tables)
        stored_as = split if split in available else "train"
        if stored_as not in available:
            raise InputError(
                f"task {self.task.name!r} has no {split} split, only {name_list(available)}; name one with {split}: ..."
            )
        table = self.source.tables[stored_as]
        remainders = np.array([remainder(self._input(row)) for row in table], np.uint8)
        rows = split_rows(split, available, remainders)
        if not len(rows):
            raise InputError(f"the {split} split of task {self.task.name!r} is empty; name one with {split}: ...")
        return table, rows

    def _input(self, row: Mapping[str, Any]) -> bytes:
        """What decides a row's split where the data lacks one: its columns but the answer, joined by a zero byte."""
        if self.kind == "messages":
            return json.dumps((row["messages"] or [])[:-1], sort_keys=True, ensure_ascii=False).encode()
        values = (row.get(column) for column in _INPUTS[str(self.kind)])
        texts = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values)
        return "\0".join(texts).encode()
