"""Integer labels mean the same in every format: the words they are, or their places, and never one of two by guess."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from task_files import table, texts

from fusionlab.errors import InputError

TEXT = datasets.Value("string")
FORMATS = ("jsonl", "csv", "parquet", "parquet text")


def write(folder: Path, kind: str, values: list[int]) -> Path:
    suffix = kind.split()[0]
    file, said = folder / f"test.{suffix}", [f"row {number}" for number in range(len(values))]
    folder.mkdir()
    if suffix == "jsonl":
        rows = [{"text": text, "label": value} for text, value in zip(said, values, strict=True)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "csv":
        lines = [f"{text},{value}" for text, value in zip(said, values, strict=True)]
        file.write_text("\n".join(["text,label", *lines]) + "\n")
    else:
        is_text = kind.endswith("text")
        labels: list[Any] = [str(value) for value in values] if is_text else values
        features = {"text": TEXT, "label": TEXT if is_text else datasets.Value("int64")}
        table(file, {"text": said, "label": labels}, features)
    return file


ONE_READING: dict[str, tuple[list[int], dict[str, Any], list[str]]] = {
    "names alone": ([1, 2, 1], {"label_words": ["1", "2"]}, ["1", "2", "1"]),
    "names alone, turned": ([5, 1, 3], {"label_words": ["5", "4", "3", "2", "1"]}, ["5", "1", "3"]),
    "names in another spelling": ([1, 2], {"label_words": ["02", "01"]}, ["01", "02"]),
    "places alone": ([0, 1, 0], {"label_words": ["no", "yes"]}, ["no", "yes", "no"]),
    "both the same": ([1, 0], {"label_words": ["0", "1"]}, ["1", "0"]),
    "named": ([0, 1], {"label_words": ["1", "0"], "class_names": ["1", "0"]}, ["0", "1"]),
    "placed": ([0, 1], {"label_words": ["1", "0"], "class_names": ["0", "1"]}, ["1", "0"]),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("case", ONE_READING)
def test_integers_have_one_reading_in_every_format(tmp_path: Path, case: str, kind: str) -> None:
    values, task, answers = ONE_READING[case]
    assert list(texts(write(tmp_path / "set", kind, values), **task).answers) == answers


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("values", "words"), [([0, 1], ["1", "0"]), ([1, 1], ["1", "0"]), ([0, 2], ["0", "2", "1"])])
def test_two_readings_that_differ_are_refused(tmp_path: Path, kind: str, values: list[int], words: list[str]) -> None:
    value = next(value for value in values if words[value] != str(value))
    told = f"label {value} is the label word '{value}' by its name, and '{words[value]}' by its place from 0"
    with pytest.raises(InputError, match=re.escape(told)) as caught:
        texts(write(tmp_path / "set", kind, values), label_words=words)
    assert f"class_names: [{', '.join(words)}] where labels are the words themselves, [0, 1" in str(caught.value)


def test_a_class_label_says_itself_what_its_integers_are(tmp_path: Path) -> None:
    features = {"text": TEXT, "label": datasets.ClassLabel(names=["0", "1"])}
    table(tmp_path / "set/test.parquet", {"text": ["a", "b"], "label": [0, 1]}, features)
    assert list(texts(tmp_path / "set/test.parquet", label_words=["1", "0"]).answers) == ["0", "1"]
