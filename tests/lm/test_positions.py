"""Networks whose positions are rows of a table read no more tokens than it has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionlab.__main__ import main
from fusionlab.backbones.answer_tree import AnswerTree
from fusionlab.backbones.causal import CausalBackbone
from fusionlab.backbones.positions import check_positions
from fusionlab.errors import InputError

MOST = 24


def gpt2(tokenizer: Any, folder: Path) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=MOST, bos_token_id=0, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("row", "new", "message"),
    [
        (
            {"text": "one two " * 20},
            4,
            r"a sample of task 'own' has \d+ tokens, and a GPT2LMHeadModel with 24 positions",
        ),
        (
            {"prompt": "one two:", "completion": " x"},
            60,
            r"a prompt of task 'own' with its generated answer has \d+ tok",
        ),
        (
            {"sentence": "one two", "label": "a very long label word of many tokens, many of them and many more"},
            4,
            r"a prompt of task 'own' with its longest label word has \d+ tokens, and a GPT2LMHeadModel with 24",
        ),
    ],
)
def test_samples_longer_than_the_table_end_a_fit_before_it_begins(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, str], new: int, message: str
) -> None:
    key = next(iter(row))
    rows = [{**row, key: f"{place} {row[key]}"} for place in range(40)]
    task: dict[str, object] = {"name": "own", "path": str(tmp_path / "own.jsonl")}
    if "label" in row:  # most samples have the short word, as the task's longest would be refused as a sample
        rows = [{**each, "label": "no"} for each in rows]
        task |= {"input_columns": ["sentence"], "label_words": ["no", row["label"]]}
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    argv = ["fit", "--model", "CausalModule", "--model.backbone", gpt2(tokenizer, tmp_path / "gpt2"), "--data"]
    argv += ["ChatTasks", "--data.tasks", json.dumps([task])]
    argv += ["--data.cache_dir", str(tmp_path / "cache"), "--model.max_new_tokens", str(new), "--trainer.max_steps"]
    argv += ["1", "--data.chat_template_path", "none"]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_questions_longer_than_the_table_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    backbone = CausalBackbone.load(gpt2(tokenizer, tmp_path / "gpt2"), name="gpt2")
    ids = torch.arange(30, 50)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert len(backbone.generate(ids, mask, MOST - 20 + 1, (999,))[0]) == MOST - 20 + 1
    with pytest.raises(InputError, match="a prompt with its generated answer has 25 tokens"):
        backbone.generate(ids, mask, MOST - 20 + 2, (999,))
    assert backbone.log_likelihoods(ids, mask, AnswerTree.of([[5] * 5, [6, 2]])).shape == (1, 2, 5)
    with pytest.raises(InputError, match="a prompt with an answer has 25 tokens"):
        backbone.log_likelihoods(ids, mask, AnswerTree.of([[5] * 6, [6, 2]]))


def test_label_words_longer_than_what_is_generated_end_a_fit_before_it_begins(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"sentence": f"film {place}", "label": place % 2} for place in range(40)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    task = {"name": "own", "path": str(tmp_path / "own.jsonl"), "input_columns": ["sentence"]}
    argv = ["fit", "--model", "CausalModule", "--model.evaluation", "generate", "--data", "ChatTasks"]
    argv += ["--data.tasks", json.dumps([task | {"label_words": ["no", "good good good"]}])]
    argv += ["--data.cache_dir", str(tmp_path / "cache"), "--trainer.default_root_dir", str(tmp_path / "run")]
    assert main([*argv, "--model.max_new_tokens", "2"]) == 2
    message = r"the longest label word of task 'own' has [3-9] tokens, but max_new_tokens is 2; raise it"
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_questions_are_refused_before_any_is_answered(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "one"}, {"prompt": "one", "choices": ["x", "y " * 40]}]
    for name, row in enumerate(rows):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        argv = ["predict", "--model", "CausalModule", "--model.backbone", gpt2(tokenizer, tmp_path / "gpt2")]
        argv += ["--data", "ChatTasks", "--data.prompts", str(tmp_path / f"{name}.jsonl"), "--output"]
        argv += [str(tmp_path / "answers.jsonl"), "--trainer.default_root_dir", str(tmp_path / "run")]
        assert main([*argv, "--model.max_new_tokens", "60"]) == 2
        assert "a prompt with its answer has " in capsys.readouterr().err
        assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(("kind", "reads_on"), [("llama", True), ("gemma2", True), ("gpt2", False)])
def test_positions_that_are_computed_end_nowhere(
    causal_folder: Callable[[str], Path], kind: str, reads_on: bool
) -> None:
    model = CausalBackbone.load(str(causal_folder(kind)), name=kind).model
    check_positions(model, 512, "it")
    if reads_on:
        check_positions(model, 513, "it")
    else:
        with pytest.raises(InputError, match="it has 513 tokens, and a GPT2LMHeadModel with 512 positions"):
            check_positions(model, 513, "it")
