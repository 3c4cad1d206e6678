"""Where the rows of a task come from: instruction data, columns with labels or scores, or embedded questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fusionlab.data.asking import ASKED_TASKS, AskedTask
from fusionlab.data.base import embedded_name
from fusionlab.data.chat.rows import FORMATS, find_format
from fusionlab.data.known_tasks import TEXT_TASKS
from fusionlab.data.rendering import TextSource
from fusionlab.data.sources import open_source as open_tables
from fusionlab.data.splits import remainder, split_rows
from fusionlab.data.tasks import Task
from fusionlab.errors import InputError, name_list

_INPUTS = {"completion": ("prompt",), "instruction": ("instruction", "input"), "text": ("text",)}


class Source(Protocol):
    """The rows of a task by split."""

    kind: str
    """``ranked``, ``score``, ``asked``, or the format of the rows."""

    label_words: tuple[str, ...] | None
    """The answers to rank, in label order; None where there are none."""

    def table(self, split: str) -> tuple[Any, np.ndarray, np.ndarray]:
        """The split as a ``datasets.Dataset``, its rows' numbers in the data, and their targets, -1 for none.

        Raises:
            InputError: the data has neither the split nor one to carve it from, or it is empty.
        """

    def row(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """A raw row as :meth:`table` has it."""


def open_source(task: Task, cache: Path) -> Source:
    """The rows of a task.

    Args:
        task: the task, completed.
        cache: folder in which local tables are prepared.

    Raises:
        InputError: the data cannot be read as the task says.
    """
    if (asked := embedded_name(task)) is not None:
        return AskedSource(ASKED_TASKS[asked])
    return QuestionSource(task, cache) if is_ranked(task) else ChatSource(task, cache)


def is_ranked(task: Task) -> bool:
    """Whether the task reads columns by a template, and is answered by a label word or a number."""
    return any((task.input_columns, task.template, task.target_column))


class AskedSource:
    """An embedded task: rows of ``question`` and ``answer``.

    Args:
        task: the embedded task.
    """

    def __init__(self, task: AskedTask) -> None:
        self.task, self.label_words = task, task.label_words
        self.kind = "asked" if task.label_words is None else "ranked"

    def table(self, split: str) -> tuple[Any, np.ndarray, np.ndarray]:
        """As :class:`Source`."""
        asked, answers, labels = self.task.rows(split)
        return _questions(asked, answers), np.arange(len(asked)), np.array(labels, np.int64)

    def row(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """As :class:`Source`."""
        return raw


class QuestionSource:
    """Columns that a template makes a question of, answered by a label word or a number.

    Args:
        task: the task, completed.
        cache: folder in which local tables are prepared.
    """

    def __init__(self, task: Task, cache: Path) -> None:
        self.texts = TextSource(task, TEXT_TASKS.get(task.name), cache)
        self.label_words = self.texts.label_words
        self.kind = "score" if self.label_words is None else "ranked"

    def table(self, split: str) -> tuple[Any, np.ndarray, np.ndarray]:
        """As :class:`Source`."""
        texts = self.texts.texts(split)
        return _questions(texts.inputs, texts.answers), np.arange(len(texts)), texts.targets

    def row(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """As :class:`Source`."""
        return {"question": self.texts.render(raw), "answer": self.texts.answer(raw)}


class ChatSource:
    """Instruction data on the hub or in local files.

    Args:
        task: the task, completed.
        cache: folder in which local tables are prepared.

    Raises:
        InputError: the data cannot be read, or its columns are those of no format.
    """

    def __init__(self, task: Task, cache: Path) -> None:
        self.task, self.source = task, open_tables(task, cache)
        columns = {name: table.column_names for name, table in self.source.tables.items()}
        kinds = {name: find_format(found) for name, found in columns.items()}
        self.label_words = None
        kind = next(iter(kinds.values()))
        if kind is None:
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
        self.kind = kind

    def table(self, split: str) -> tuple[Any, np.ndarray, np.ndarray]:
        """As :class:`Source`; a split that the data lacks is carved out of training."""
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
        return table.select(rows), rows, np.full(len(rows), -1, np.int64)

    def row(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """As :class:`Source`."""
        return raw

    def _input(self, row: Mapping[str, Any]) -> bytes:
        """What decides a row's split where the data lacks one: its columns but the answer, joined by a zero byte."""
        if self.kind == "messages":
            said = row["messages"] or []
            asked = said[:-1] if isinstance(said, list) else said  # what is no list is refused when it is read
            return json.dumps(asked, sort_keys=True, ensure_ascii=False, default=str).encode()
        values = (row.get(column) for column in _INPUTS[self.kind])
        texts = (v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str) for v in values)
        return "\0".join(texts).encode()


def _questions(asked: Sequence[str], answers: Sequence[str]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"question": list(asked), "answer": list(answers)})
