"""Rows of a table as text-to-text samples: what the model reads, what it should answer, and the target behind that."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from fusionlab.data.labels import Labels, read_labels
from fusionlab.data.local import Source
from fusionlab.data.sources import open_source
from fusionlab.data.splits import remainder, split_rows
from fusionlab.data.tasks import Task, check_duplicates
from fusionlab.errors import InputError, did_you_mean, name_list

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_FIELD = re.compile(r"\{([^{}]+)\}")
_log = logging.getLogger(__name__)
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Texts:
    """Text-to-text samples.

    Args:
        inputs: what the model reads.
        answers: what it should answer.
        targets: the label word's index, int64, or the score, float32; shape ``(samples,)``.
    """

    inputs: Sequence[str]
    answers: Sequence[str]
    targets: np.ndarray

    @functools.cached_property
    def version(self) -> str:
        """The first 16 hex digits of SHA-256 over inputs and answers, each ended by a zero byte."""
        digest = hashlib.sha256()
        for texts in zip(self.inputs, self.answers, strict=True):
            digest.update("".join(f"{text}\0" for text in texts).encode())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.inputs)

    def __getitem__(self, rows: np.ndarray) -> Texts:
        """The samples at ``rows``."""
        return Texts([self.inputs[row] for row in rows], [self.answers[row] for row in rows], self.targets[rows])


class TextSource:
    """The samples of a task that lies on the hub or in local files.

    Args:
        task: the task, completed.
        definition: the known task of the same name, or None.
        cache: folder in which local tables are prepared.

    Raises:
        InputError: columns, template, label words and data do not fit one another.
    """

    def __init__(self, task: Task, definition: Task | None, cache: Path) -> None:
        self.task = task
        self.source = open_source(task, cache, definition)
        self.template = task.template or default_template(task)
        self.columns = task.input_columns or tuple(dict.fromkeys(_FIELD.findall(self.template)))
        for column in (*self.columns, *_FIELD.findall(self.template)):
            for table in self.source.tables.values():
                _check_text(task, table.features, column)
        self._labels = None if task.target_column else _labels(self.source, definition)
        self.label_words = None if self._labels is None else _label_words(task, self._labels)

    def texts(self, split: str) -> Texts:
        """The samples of a split; one that the data lacks is carved out of training.

        A score is answered by its text with one decimal; where that makes one answer of several scores, it is said how
        many, as no model can tell them apart then.

        Raises:
            InputError: the data has neither the split nor a training split, it is empty, or texts are empty.
        """
        available = tuple(self.source.tables)
        stored_as = split if split in available else "train"
        if stored_as not in available:
            raise InputError(
                f"task {self.task.name!r} has no {split} split, only {name_list(available)}; name one with {split}: ..."
            )
        texts, remainders = self._table(stored_as)
        rows = split_rows(split, available, remainders)
        if not len(rows):
            raise InputError(f"the {split} split of task {self.task.name!r} is empty; name one with {split}: ...")
        self._tell_of_one_decimal(split, texts[rows])
        return texts[rows]

    def _tell_of_one_decimal(self, split: str, texts: Texts) -> None:
        scores, answers = len(np.unique(texts.targets)), len(set(texts.answers))
        if self.label_words is None and answers < scores:
            _log.warning(
                "task %r (%s): its %d different scores are answered with one decimal, by %d different texts, so that "
                "no model's correlation reaches 1; multiply %r where finer differences count",
                *(self.task.name, split, scores, answers, self.task.target_column),
            )

    def render(self, row: Mapping[str, Any]) -> str:
        """What the model reads of one raw row.

        Raises:
            InputError: the row has not all columns, or what is in one is no text, number or time.
        """
        said = {}
        for column in _FIELD.findall(self.template):
            _check_column(self.task, row, column, "text")
            if isinstance(row[column], bytes | list | tuple | dict | np.ndarray):
                raise InputError(f"task {self.task.name!r}: column {column!r} holds no text but {row[column]!r}")
            said[column] = [_text(row[column])]
        return _rendered(self.template, said, 0)

    def answer(self, row: Mapping[str, Any]) -> str:
        """What it should answer to one raw row.

        Raises:
            InputError: the row has no label, or none of the task's; or no score.
        """
        if self.label_words is None or self._labels is None:
            column = str(self.task.target_column)
            _check_column(self.task, row, column, "score")
            score = _score(row[column])
            if not abs(score) <= _LARGEST:
                raise InputError(f"task {self.task.name!r}: the row has no number in {column!r}, but {row[column]!r}")
            return _said_score(score)
        _check_column(self.task, row, self._labels.column, "label")
        label = row[self._labels.column]
        place = self._labels.place(label)
        if place is not None:
            return self.label_words[place]
        if label in self.label_words:
            return str(label)
        raise InputError(
            f"task {self.task.name!r} has no label {label!r}; it has {name_list(self._labels.class_names)}"
        )

    def _table(self, split: str) -> tuple[Texts, np.ndarray]:
        table = self.source.tables[split]
        names = dict.fromkeys((*self.columns, *_FIELD.findall(self.template)))
        columns = {name: [_text(value) for value in table[name][:]] for name in names}
        parts = list(zip(*(columns[name] for name in self.columns), strict=True))
        self._check_not_empty(split, parts)
        remainders = np.array([remainder("\0".join(part).encode()) for part in parts], np.uint8)
        rendered = [_rendered(self.template, columns, row) for row in range(len(parts))]
        if self.label_words is None or self._labels is None:
            scores = self._scores(split)
            return Texts(rendered, list(map(_said_score, scores.tolist())), scores.astype(np.float32)), remainders
        labels = self._labels.by_split[split]
        return Texts(rendered, [self.label_words[label] for label in labels.tolist()], labels), remainders

    def _check_not_empty(self, split: str, parts: Sequence[tuple[str, ...]]) -> None:
        empty = [str(row) for row, texts in enumerate(parts) if not any(text.strip() for text in texts)]
        if empty:
            raise InputError(
                f"task {self.task.name!r}: {len(empty)} of {len(parts)} rows of {split} have no text in "
                f"{name_list(self.columns)}: rows {name_list(empty)}; remove them"
            )

    def _scores(self, split: str) -> np.ndarray:
        from datasets import Value

        task, table = self.task, self.source.tables[split]
        column = task.target_column or ""
        _check_column(task, table.features, column, "score")
        feature = table.features[column]
        scores = np.array([_score(value) for value in table[column][:]])
        bad = [str(row) for row in np.flatnonzero(~(np.abs(scores) <= _LARGEST))]
        if not isinstance(feature, Value) or (len(bad) == len(scores) and feature.dtype.endswith("string")):
            raise InputError(f"target_column {column!r} of task {task.name!r} holds no numbers but {feature}")
        if bad:
            raise InputError(
                f"task {task.name!r}: {len(bad)} of {len(scores)} rows of {split} have no number in {column!r}: rows "
                f"{name_list(bad)}, counted from 0"
            )
        return scores


def default_template(task: Task) -> str:
    """The task's name, then each input column's name and text, as GLUE's tasks are put in arXiv 2310.04742.

    Raises:
        InputError: the task says no columns.
    """
    if not task.input_columns:
        raise InputError(
            f"task {task.name!r} does not say which columns to read; add input_columns: [...] or, with the columns in "
            f'braces, template: "..."'
        )
    return f"{task.name} " + " ".join(f"{column}: {{{column}}}" for column in task.input_columns)


def check_text_task(task: Task) -> None:
    """Raise unless the task's own settings fit one another.

    Raises:
        InputError: label words beside a score, a template without a column, words that repeat or do not match classes.
    """
    if task.target_column and (task.label_words or task.class_names):
        raise InputError(
            f"task {task.name!r} has both target_column (a score) and label_words or class_names (classes); give one"
        )
    if task.template is None:
        default_template(task)
    elif not _FIELD.search(task.template):
        raise InputError(
            f"template {task.template!r} of task {task.name!r} holds no column in braces, such as {{text}}"
        )
    words = task.label_words or ()
    check_duplicates(words, f"label_words of task {task.name!r}")
    if task.class_names and words and len(words) != len(task.class_names):
        raise InputError(
            f"task {task.name!r} has {len(words)} label_words for {len(task.class_names)} class_names; give one each"
        )


def _labels(source: Source, definition: Task | None) -> Labels:
    task = source.task
    listed = task.class_names
    if listed is None and definition is not None and len(definition.class_names or ()) == len(task.label_words or ()):
        listed = definition.class_names
    listed = listed or task.label_words
    listed_as = "class_names" if task.class_names else "label_words"
    return read_labels(replace(source, task=replace(task, class_names=listed)), definition, listed_as)


def _label_words(task: Task, labels: Labels) -> tuple[str, ...]:
    words = task.label_words or labels.class_names
    if len(words) != len(labels.class_names):
        raise InputError(
            f"task {task.name!r} has {len(words)} label_words ({name_list(words)}) for the {len(labels.class_names)} "
            f"classes {name_list(labels.class_names)}; give one each, in this order"
        )
    if len(words) < 2:
        raise InputError(f"task {task.name!r} has {len(words)} class ({name_list(words)}); at least 2 are needed")
    return words


def _check_column(task: Task, features: Mapping[str, Any], column: str, what: str) -> None:
    if column not in features:
        raise InputError(f"task {task.name!r} has no column {column!r} ({what}); {did_you_mean(column, features)}")


def _check_text(task: Task, features: Mapping[str, Any], column: str) -> None:
    from datasets import ClassLabel, Value

    _check_column(task, features, column, "text")
    feature = features[column]
    if not isinstance(feature, Value | ClassLabel) or "binary" in str(feature.dtype):
        raise InputError(f"task {task.name!r}: column {column!r} holds no text but {feature}; name another")


def _text(value: Any) -> str:
    """A cell as text; empty where there is none, which tables of numbers say by NaN."""
    return "" if value is None or (isinstance(value, Real) and value != value) else str(value)


def _score(value: Any) -> float:
    """A number, or a text that is one; else NaN."""
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value) else math.nan
    return float(value) if isinstance(value, Real | Decimal) else math.nan


def _said_score(score: float) -> str:
    return f"{score:.1f}"


def _rendered(template: str, columns: Mapping[str, Sequence[str]], row: int) -> str:
    return _FIELD.sub(lambda field: columns[field[1]][row], template)
