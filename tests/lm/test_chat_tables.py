"""Tokenizers by their folder, cut samples, and the columns that answers are asked for at."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusionlab import ChatTasks
from fusionlab.backbones.answer_tree import AnswerTree
from fusionlab.errors import InputError


def tasks_in(folder: Path) -> list[str | dict[str, Any]]:
    rows = [{"prompt": f"film {i}:", "completion": " one two three" * (1 + i % 4)} for i in range(60)]
    (folder / "count.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"name": "count", "path": str(folder / "count.jsonl")}]


def test_code_beside_a_tokenizer_is_not_run(
    causal_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(causal_folder("llama"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import GPT2Tokenizer as Own\n")
    data = ChatTasks(tasks_in(tmp_path), tokenizer=str(folder), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"data\.tokenizer: .* has no tokenizer that can be read; .*trust_remote_code"):
        data.setup()
    assert not ran.exists()


def test_tokenizers_that_are_not_there_are_refused_by_the_flag(tmp_path: Path) -> None:
    data = ChatTasks(tasks_in(tmp_path), tokenizer=str(tmp_path / "gone"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"data\.tokenizer: .*gone' does not exist"):
        data.setup()


@pytest.mark.parametrize("max_length", [9, 12, 15, 18, 40])
def test_cut_samples_are_counted_when_tokenized_and_from_the_cache(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, max_length: int
) -> None:
    def told(length: int) -> tuple[list[str], int]:
        caplog.clear()
        data = ChatTasks(tasks_in(tmp_path), tokenizer=tokenizer, max_length=length, cache_dir=str(tmp_path / "cache"))
        with caplog.at_level(logging.WARNING):
            data.setup("test")
        lengths = data.splits["count"]["test"].samples.input_ids.lengths
        return [record.getMessage() for record in caplog.records], lengths

    lengths = told(1000)[1]
    expected = int((lengths > max_length).sum())
    for _ in range(2):
        messages = told(max_length)[0]
        said = f"{expected} of {len(lengths)} samples of task 'count' (test) are longer than max_length {max_length}"
        assert bool(expected) == any(said in message for message in messages), messages


@pytest.mark.parametrize(
    "answers",
    [[[5]], [[5], [6, 7]], [[1, 2, 3], [1, 2], [4]], [[9, 9, 9, 9]], [[3], [3, 4], [3, 4, 5], [0, 0]]],
    ids=str,
)
def test_tokens_of_answers_are_asked_for_where_their_prefix_was_read(answers: list[list[int]]) -> None:
    tree = AnswerTree.of(answers)
    torch.manual_seed(0)
    logits = torch.randn(2, tree.num_columns, 11, dtype=torch.float64)
    found, of_tokens = tree.log_likelihoods(logits), logits.float().log_softmax(-1)
    column = {(word, -1): 0 for word in range(len(answers))}
    for place, (word, depth) in enumerate(zip(tree.word.tolist(), tree.depth.tolist(), strict=True)):
        column[word, depth] = 1 + place
    longest = max(map(len, answers))
    expected = torch.zeros(2, len(answers), longest)
    for word, ids in enumerate(answers):
        for depth, token in enumerate(ids):
            expected[:, word, depth] = of_tokens[:, column[word, depth - 1], token]
    torch.testing.assert_close(found, expected)
    rows = torch.randn(len(answers), longest, 11)
    apart = tree.log_likelihoods_apart(rows)
    for word, ids in enumerate(answers):
        own = rows[word].log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(apart[word, : len(ids)], own)
        assert not apart[word, len(ids) :].any()
