"""The splits of a task: what the data calls them, and which rows are carved out of training where one is missing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fusionlab.data.layout import split_called
from fusionlab.data.tasks import Task
from fusionlab.errors import InputError, did_you_mean

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
CARVED = {"validation": 0, "test": 1}


def split_names(task: Task, known: list[str], known_test: str | None = None) -> dict[str, str]:
    """The data's name (or slice) for each split that it has; a split that serves as another is not used twice."""
    given: dict[str, str] = {split: name for split in SPLITS if (name := getattr(task, split))}
    for name in () if known_test is None else (known_test, known_test.partition("_")[0]):
        if "test" not in given and name in known and name not in given.values():
            given["test"] = name
    taken: set[str] = set()
    for split, name in given.items():
        base, bracket, piece = name.partition("[")
        if base not in known:  # a folder of another case
            base = split_called(base) or base
            given[split] = f"{base}{bracket}{piece}"
        if base not in known:
            raise InputError(f"task {task.name!r} has no split {name!r} for {split}; {did_you_mean(name, known)}")
        if bracket and base in SPLITS and base not in given:
            raise InputError(
                f"task {task.name!r} uses {name!r} for {split}; say what is left of it too, e.g. {base}: '{base}[20%:]'"
            )
        taken.add(base)
    return given | {split: split for split in SPLITS if split not in given and split in known and split not in taken}


@dataclass(frozen=True)
class Piece:
    """The rows that are a split.

    Args:
        name: what the data call it, with the slice.
        table: what they are rows of.
        rows: their numbers.
    """

    name: str
    table: object
    rows: range


def rows_of(name: str, size: int) -> range:
    """The rows of a table of ``size`` that a name such as ``train[:80%]`` means; all of one without brackets."""
    import datasets

    _, bracket, rest = name.partition("[")
    (found,) = datasets.ReadInstruction.from_spec(f"train{bracket}{rest}").to_absolute({"train": size})
    return range(found.from_ or 0, size if found.to is None else found.to)


def check_apart(task: Task, pieces: Mapping[str, Piece]) -> None:
    """Raise if rows are trained on that are scored too.

    Raises:
        InputError: naming both splits, and how many rows they share.
    """
    train = pieces.get("train")
    for split, piece in pieces.items():
        if train is None or split == "train" or piece.table != train.table:
            continue
        shared = range(max(piece.rows.start, train.rows.start), min(piece.rows.stop, train.rows.stop))
        if len(shared):
            raise InputError(
                f"task {task.name!r}: train {train.name!r} and {split} {piece.name!r} share {len(shared)} of "
                f"{len(piece.rows)} rows; give slices that are apart, e.g. train: 'train[20%:]', {split}: 'train[:20%]'"
            )


def split_rows(split: str, available: Sequence[str], remainders: np.ndarray) -> np.ndarray:
    """The rows of ``split``, int64, in the table that holds them: its own, or training's where the data lacks it.

    A split that the data lacks is carved out of training by a hash of each row's input (SHA-256, first four bytes,
    big-endian): a row is kept for validation if it is 0 modulo 10, and for test if it is 1. So a split is stable, and
    duplicates stay together.

    Args:
        split: train, validation or test.
        available: the splits that the data has.
        remainders: the hash modulo 10 of each row of the table.
    """
    carved = {name: remainder for name, remainder in CARVED.items() if name not in available}
    if split in carved:
        return np.flatnonzero(remainders == carved[split])
    if split == "train":
        return np.flatnonzero(~np.isin(remainders, list(carved.values())))
    return np.arange(len(remainders))


def remainder(data: bytes) -> int:
    """The hash of an input that decides its split where the data lacks one: 0..9."""
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "big") % 10
