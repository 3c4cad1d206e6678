"""Options of language models that would do nothing, or could not be: refused by name before anything is written."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fusionlab.__main__ import main
from fusionlab.backbones import load_backbone
from fusionlab.backbones.answer_tree import AnswerTree
from fusionlab.backbones.masks import additive_masks
from fusionlab.errors import InputError
from fusionlab.evaluation.rows import _tell_left_out, mean_score

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def refused(
    causal_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    rows = [{"prompt": f"film {i}:", "completion": " yes"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = json.dumps([{"name": "a", "path": str(tmp_path / "a.jsonl")}])

    def told(*more: str) -> str:
        argv = ["fit", "--model", "CausalModule", "--model.backbone", str(causal_folder("llama")), *more]
        argv += ["--data", "ChatTasks", "--data.tasks", tasks, "--data.cache_dir", str(tmp_path / "cache")]
        assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    return told


@pytest.mark.parametrize("method", ["full", "tangent", "tangent_lora"])
def test_weights_that_are_not_recomputed_take_no_checkpointing(refused: Callable[..., str], method: str) -> None:
    told = refused("--model.method", method, "--model.gradient_checkpointing", "true")
    assert f"gradient_checkpointing with method {method!r}" in told
    assert "leave --model.gradient_checkpointing out" in told


def test_an_evaluation_of_a_task_without_words_is_refused(refused: Callable[..., str]) -> None:
    assert "evaluation for task 'a', which has no label words" in refused("--model.evaluation", "{a: generate}")


def test_a_network_that_gives_all_logits_is_refused_by_name(tokenizer: Any, tmp_path: Path) -> None:
    config = transformers.xLSTMConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_heads=2)
    transformers.xLSTMForCausalLM(config).save_pretrained(tmp_path / "xlstm")
    tokenizer.save_pretrained(tmp_path / "xlstm")
    with pytest.raises(InputError, match="is a xLSTMForCausalLM, whose forward has no logits_to_keep"):
        load_backbone(str(tmp_path / "xlstm"))


def test_answers_of_one_token_do_not_tell_how_longer_ones_are_scored(
    causal_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the architecture took no mask, which answers of one token cannot show."""
    monkeypatch.setattr(
        "fusionlab.backbones.causal.additive_masks",
        lambda model, visible, positions: additive_masks(model, torch.ones_like(visible).tril(), positions),
    )
    backbone = load_backbone(str(causal_folder("qwen2")))
    prompt, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
    long = AnswerTree.of([[8, 9, 10], [11, 12, 13]])
    with torch.no_grad():
        expected = load_backbone(str(causal_folder("qwen2"))).log_likelihoods(prompt, mask, long)
        backbone.log_likelihoods(prompt, mask, AnswerTree.of([[8], [9]]))
        torch.testing.assert_close(backbone.log_likelihoods(prompt, mask, long), expected)


def test_tasks_without_a_say_in_choices_are_told(caplog: pytest.LogCaptureFixture) -> None:
    _tell_left_out.cache_clear()
    rows = [{"task": "a", "metric": "accuracy", "value": 0.5}, {"task": "b", "metric": "perplexity", "value": 9.0}]
    with caplog.at_level(logging.WARNING):
        assert mean_score(rows) == mean_score(rows) == 0.5
    assert caplog.text.count("tasks that are scored by perplexity, which is in another unit, have no say") == 1
    caplog.clear()
    assert mean_score(rows[1:]) < 0
    assert not caplog.text
