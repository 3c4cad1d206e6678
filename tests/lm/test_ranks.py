"""Language models on two processes: the weights of one process with a batch of twice the size, and identical rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from fusionlab import load
from fusionlab.__main__ import main

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TASKS = ("mood", "count", "tale")


@pytest.fixture(scope="module")
def flags(causal_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny Llama on tasks whose samples learn from 2 to 13 tokens, of sizes that nothing divides."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "mood": [{"text": f"a film {i}", "label": i % 2} for i in range(61)],
        "count": [{"prompt": f"film {i}:", "completion": " one" * (1 + i % 12)} for i in range(67)],
        "tale": [{"text": f"film {i} " + "or two " * (i % 7)} for i in range(71)],
    }
    for name, of_task in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_task))
    tasks: list[dict[str, Any]] = [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in rows]
    tasks[0] |= {"input_columns": ["text"], "label_words": ["positive", "negative"]}
    model = ["--model", "CausalModule", "--model.backbone", str(causal_folder("llama")), "--model.max_new_tokens", "4"]
    data = ["--data", "ChatTasks", "--data.tasks", json.dumps(tasks), "--data.cache_dir", str(folder / "cache")]
    return [*model, *data, "--data.eval_batch_size", "4", "--trainer.accelerator", "cpu"]


def fitted(root: Path, *more: str) -> list[str]:
    argv = ["--trainer.max_steps", "3", "--fusion.rules", "[average]", "--trainer.enable_progress_bar", "false"]
    return ["fit", *more, *argv, "--trainer.default_root_dir", str(root)]


def rows_of(root: Path) -> list[dict[str, Any]]:
    return json.loads((root / "results.json").read_text())["rows"]


@pytest.fixture(scope="module")
def run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On two processes, four samples each, two of them accumulated."""
    root = tmp_path_factory.mktemp("two") / "run"
    argv = fitted(root, *flags, "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "2")
    ranks.command(argv, 2, root.parent / "told")
    return root


def test_the_weights_are_those_of_one_process(run: Path, flags: list[str], tmp_path: Path) -> None:
    assert main(fitted(tmp_path / "run", *flags, "--data.batch_size", "8")) == 0
    for task in TASKS:
        ours, theirs = (load(root / "adapters" / task) for root in (run, tmp_path / "run"))
        for module, factors in ours.factors.items():
            # another order of sums; updates of Adam are about the learning rate, 2e-4
            torch.testing.assert_close(factors.lora_b, theirs.factors[module].lora_b, rtol=0, atol=1e-5)
            torch.testing.assert_close(factors.lora_a, theirs.factors[module].lora_a, rtol=0, atol=1e-5)
        assert any(factors.lora_b.abs().max() > 1e-4 for factors in ours.factors.values())


def test_the_same_weights_have_identical_rows(run: Path, flags: list[str], tmp_path: Path) -> None:
    argv = ["test", *flags, "--model.weights", str(run / "fused" / "average"), "--trainer.default_root_dir"]
    assert main([*argv, str(tmp_path / "one")]) == 0
    ranks.command([*argv, str(tmp_path / "two")], 2, tmp_path / "told")
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
    of_run = {(row["task"], row["metric"]): row["value"] for row in rows_of(run) if row["rule"] == "average"}
    assert {(row["task"], row["metric"]): row["value"] for row in rows_of(tmp_path / "two")} == of_run


@pytest.mark.slow
def test_lm_eval_runs_on_the_first_process_alone(run: Path, flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    questions = [{"question": f"film {i}:", "choices": [" one", " two three"], "answer": i % 2} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    task = {
        "task": "choose", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
    }  # fmt: skip
    weights = ["--model.weights", str(run / "fused" / "average"), "--harness", json.dumps([task])]
    argv = ["test", *flags, *weights, "--trainer.default_root_dir"]
    assert main([*argv, str(tmp_path / "one")]) == 0
    assert "scored by the first of 2 processes" in ranks.command([*argv, str(tmp_path / "two")], 2, tmp_path / "told")
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
    assert [row["metric"] for row in rows_of(tmp_path / "two") if "lm_eval" in row] == ["acc", "acc_norm"]
