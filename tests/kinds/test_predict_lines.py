"""``predict`` reads one text a line, and a line is what every tool counts: it ends with a line feed."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from fusionlab.data.chat import prompts
from fusionlab.data.text import TextTasks
from fusionlab.errors import InputError
from fusionlab.evaluation.predicting import write_predictions

SEPARATORS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\r"]


@pytest.fixture(scope="module")
def tokenizer(t5_folder: Callable[[str], Path]) -> Any:
    return AutoTokenizer.from_pretrained(t5_folder("tied"))


def texts(source: str, tokenizer: Any) -> list[str]:
    """The texts of all batches."""
    data = TextTasks(["sentiment"], eval_batch_size=3, texts=source)
    module = SimpleNamespace(backbone=SimpleNamespace(tokenizer=tokenizer))
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)
    return [text for batch in data.predict_dataloader() for text in batch["text"]]


@pytest.mark.parametrize("separator", SEPARATORS, ids=[f"U+{ord(each):04X}" for each in SEPARATORS])
def test_other_separators_end_no_line(tmp_path: Path, tokenizer: Any, separator: str) -> None:
    lines = [f"the good{separator}sentence {number}" for number in range(5)]
    (tmp_path / "texts.txt").write_bytes("\n".join(lines).encode() + b"\n")
    assert texts(str(tmp_path / "texts.txt"), tokenizer) == lines
    write_predictions(tmp_path / "out.csv", [{"text": line, "answer": "x"} for line in lines])
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        assert [row["text"] for row in csv.DictReader(file)] == lines


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\nb\nc", ["a", "b", "c"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"\xef\xbb\xbfa\nb\n", ["a", "b"]),
        ("ä\n日本\n".encode(), ["ä", "日本"]),
        (b" a \n\tb\n", [" a ", "\tb"]),
        (b'"a\nb"\n', ['"a', 'b"']),
    ],
)
@pytest.mark.parametrize("source", ["file", "stdin"])
def test_lines(
    tmp_path: Path, tokenizer: Any, content: bytes, expected: list[str], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))
    assert texts(str(tmp_path / "texts.txt") if source == "file" else "-", tokenizer) == expected


def test_lines_without_a_text_are_counted_and_named(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "texts.txt").write_text("a\n\nb\n \nc\n")
    with caplog.at_level(logging.WARNING):
        assert texts(str(tmp_path / "texts.txt"), tokenizer) == ["a", "b", "c"]
    assert caplog.messages == ["data.texts: 2 of 5 lines are empty and left out: 2, 4"]


@pytest.mark.parametrize("content", ["ä\n".encode("latin-1"), "a\n".encode("utf-16"), b"ok\nno\xff\n"])
def test_another_encoding_is_refused(tmp_path: Path, tokenizer: Any, content: bytes) -> None:
    (tmp_path / "texts.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"data\.texts: .*texts\.txt is not utf-8: line [12] holds the byte 0x"):
        texts(str(tmp_path / "texts.txt"), tokenizer)


@pytest.mark.parametrize("separator", SEPARATORS[:-1], ids=[f"U+{ord(each):04X}" for each in SEPARATORS[:-1]])
def test_questions_are_one_a_line_too(tmp_path: Path, separator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"why{separator if ord(separator) > 31 else ''}{number}?"} for number in range(5)]
    (tmp_path / "asked.jsonl").write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    monkeypatch.setattr(prompts, "_question", lambda row, *more: row)
    assert prompts.read_questions(str(tmp_path / "asked.jsonl"), None, None) == rows  # type: ignore[arg-type]
    (tmp_path / "asked.jsonl").write_bytes('{"prompt": "ä"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"data\.prompts: .*asked\.jsonl is not utf-8: line 1"):
        prompts.read_questions(str(tmp_path / "asked.jsonl"), None, None)  # type: ignore[arg-type]


def test_rows_of_several_keys_are_one_table(tmp_path: Path) -> None:
    write_predictions(tmp_path / "out.csv", [{"prompt": "a", "answer": "x"}, {"prompt": "b", "scores": [1], "id": 2}])
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["prompt", "answer", "scores", "id"]
    assert [row["answer"] for row in found] == ["x", ""]
    assert [row["id"] for row in found] == ["", "2"]
