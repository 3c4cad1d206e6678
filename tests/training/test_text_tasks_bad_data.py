"""Text data that bites: every mistake has its one message."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from fusionlab.data.text import TextTasks
from fusionlab.errors import InputError

ROWS = [{"text": "a", "label": 0, "kind": "x", "score": 1.0}, {"text": "b", "label": 1, "kind": "y", "score": 2.0}]
WORDS = {"input_columns": ["text"], "label_words": ["bad", "good"]}


@pytest.fixture(scope="module")
def tokenizer(t5_folder: Callable[[str], Path]) -> Any:
    return AutoTokenizer.from_pretrained(t5_folder("tied"))


def load(folder: Path, tokenizer: Any, rows: list[dict], task: dict, stage: str = "test") -> TextTasks:
    (folder / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "set/test.parquet")
    data = TextTasks([{"name": "own", "path": str(folder / "set"), **task}], cache_dir=str(folder / "cache"))
    module = SimpleNamespace(backbone=SimpleNamespace(tokenizer=tokenizer))
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)
    data.setup(stage)
    return data


def rows(**values: list) -> list[dict]:
    """The two rows with other values in some columns."""
    return [{**row, **{name: column[index] for name, column in values.items()}} for index, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("data", "task", "message"),
    [
        (ROWS, {"input_columns": ["txt"], "label_words": ["a", "b"]}, r"no column 'txt' \(text\); did you mean 'text'"),
        (ROWS, {"template": "{txet}"}, r"task 'own' has no column 'txet' \(text\); did you mean 'text'\?"),
        (ROWS, {**WORDS, "label_column": "labl"}, r"has no column 'labl' \(label\); did you mean 'label'\?"),
        (
            ROWS,
            {"template": "{text}", "target_column": "scor"},
            r"no column 'scor' \(score\); did you mean",
        ),
        (
            ROWS,
            {"template": "{text}", "target_column": "kind"},
            r"target_column 'kind' of task 'own' holds no",
        ),
        (
            rows(score=[1.0, None]),
            {"template": "{text}", "target_column": "score"},
            r"1 of 2 rows of test have no",
        ),
        (rows(label=[0, 2]), WORDS, r"label 2 of test is out of range, the task has 2 classes \(0\.\.1\)"),
        (rows(label=[0, -1]), WORDS, r"label -1, which stands for none, in 1 of 2 rows of test"),
        (
            ROWS,
            {**WORDS, "label_column": "kind", "label_words": ["x", "z"]},
            r"label_words of task 'own' .* lacks y",
        ),
        (
            rows(kind=["x", "z"]) + ROWS,
            {**WORDS, "label_column": "kind", "class_names": ["x", "y", "z"], "label_words": ["a", "b", "c", "d"]},
            r"task 'own' has 4 label_words for 3 class_names; give one each",
        ),
        (
            rows(kind=["x", "x"]),
            {"template": "{text}", "label_column": "kind"},
            r"task 'own' has 1 class \(x\);",
        ),
        (ROWS, {"template": "{text}"}, r"labels of test are integers without names; .* label_words: \[\.\.\.\]"),
        (rows(text=["a", " "]), WORDS, r"1 of 2 rows of test have no text in text: rows 1; remove them"),
        (rows(text=["a", None]), WORDS, r"1 of 2 rows of test have no text in text: rows 1; remove them"),
    ],
)
def test_mistakes_in_a_table(tmp_path: Path, tokenizer: Any, data: list[dict], task: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, tokenizer, data, task)


def test_a_row_with_one_empty_column_of_two_stays(tmp_path: Path, tokenizer: Any) -> None:
    data = load(tmp_path, tokenizer, rows(kind=["", "y"]), {**WORDS, "input_columns": ["text", "kind"]})
    assert data.splits["own"]["test"].texts.inputs[0] == "own text: a kind: "


def test_a_split_that_is_not_there(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"task 'own' has no train split, only test; name one with train: \.\.\."):
        load(tmp_path, tokenizer, ROWS, WORDS, "fit")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("coal", {}, r"unknown task 'coal'; did you mean 'cola'\?"),
        ({"path": "."}, {}, r"task 'own' does not say which columns to read; add input_columns"),
        ({"path": ".", "template": "text"}, {}, r"template 'text' of task 'own' holds no column in braces"),
        (
            {"path": ".", "template": "{a}", "templates": ["{}"]},
            {},
            r"templates does nothing in task 'own', whose inputs a",
        ),
        ({"path": "../nowhere", "template": "{a}"}, {}, r"path '../nowhere' of task 'own' is not there"),
        ({"path": ".", **WORDS, "label_words": ["a", "a"]}, {}, r"label_words of task 'own' repeat a;"),
        (
            {"path": ".", **WORDS, "target_column": "score"},
            {},
            r"task 'own' has both target_column \(a score\) and label_w",
        ),
        ("cola", {"prompts": "nice"}, r"prompts must be 'paper' or 'natural', got 'nice'"),
        ("cola", {"max_tokens": 0}, r"max_tokens must be at least 1, got 0"),
        ("cola", {"batch_size": 0}, r"batch_size must be at least 1, got 0"),
    ],
)
def test_mistakes_in_settings(task: dict | str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TextTasks([{"name": "own", **task} if isinstance(task, dict) else task], **options)


def test_the_order_of_calls_is_named() -> None:
    data = TextTasks([{"name": "own", "path": ".", **WORDS}])
    with pytest.raises(RuntimeError, match="attach a trainer whose module has a backbone with a tokenizer"):
        data._tokenizer()
