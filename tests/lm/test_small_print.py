"""Columns of one's own beside predictions, words that stand for no file, scores that one text stands for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionlab import CausalModule, ChatTasks
from fusionlab.__main__ import main
from fusionlab.errors import InputError

from .test_answers import loaded

ASKED: dict[str, tuple[list[dict[str, Any]], set[str]]] = {
    "none": ([{"prompt": "x:"}], {"answer"}),
    "a choice": ([{"prompt": "x:", "choices": ["a", "b"]}], {"answer", "scores"}),
    "a gold answer": ([{"prompt": "x:", "answer": "gold"}, {"prompt": "y:"}], {"model_answer"}),
    "both": ([{"prompt": "x:", "choices": ["a", "b"], "answer": 1, "scores": 2}], {"model_answer", "model_scores"}),
    "ours too": ([{"prompt": "x:", "answer": 1, "model_answer": 2}], {"model_model_answer"}),
}


@pytest.fixture(scope="module")
def module(causal_folder: Callable[[str], Path]) -> CausalModule:
    return CausalModule(str(causal_folder("llama")), max_new_tokens=2)


@pytest.mark.parametrize("case", ASKED)
def test_columns_of_ones_own_are_kept(
    case: str, module: CausalModule, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, added = ASKED[case]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ChatTasks(tokenizer=tokenizer, prompts=str(tmp_path / "asked.jsonl"))
    with caplog.at_level(logging.WARNING), torch.no_grad():
        found = [row for batch in data.predict_dataloader() for row in module.predict_step(batch, 0)]
    assert [{key: row[key] for key in asked} for row, asked in zip(found, rows, strict=True)] == rows
    assert all(row.keys() - asked.keys() == added for row, asked in zip(found, rows, strict=True))
    assert (f"what the model gives is written as '{max(added)}'" in caplog.text) == any(
        "model" in name for name in added
    )


@pytest.mark.parametrize(("what", "word"), [("prompts", "none"), ("chat_template_path", "-"), ("prompts", "gone")])
def test_a_word_stands_for_no_file_where_it_is_its_option_s(what: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"data\.{what}: no file '{word}'"):
        ChatTasks(**{what: word})


def test_neither_does_a_command_take_it(causal_folder: Callable[[str], Path], tmp_path: Path, capsys: Any) -> None:
    argv = ["predict", "--model", "CausalModule", "--model.backbone", str(causal_folder("llama")), "--data"]
    argv += ["ChatTasks", "--data.prompts", "none", "--output", str(tmp_path / "out.jsonl")]
    assert main(argv) == 2
    assert "data.prompts: no file 'none'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ([0.123, 0.133, 0.143, 2.0], "its 4 different scores are answered with one decimal, by 2 different texts"),
        ([0.1, 0.2, 0.2, 3.0], None),
        ([1, 2, 3, 3], None),
    ],
)
def test_scores_of_one_text_are_counted(
    scores: list[float], told: str | None, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": f"film {place}", "y": score} for place, score in enumerate(scores)]
    with caplog.at_level(logging.WARNING):
        loaded(tokenizer, tmp_path, rows, {"input_columns": ["text"], "target_column": "y"})
    assert (f"task 'own' (test): {told}" in caplog.text) if told else "one decimal" not in caplog.text
