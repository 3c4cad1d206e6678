"""The whole job on T5 through the commands: fit, test, fuse and predict on tables of text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import T5ForConditionalGeneration

from fusionlab.__main__ import main

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def settings(t5_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a T5 and of two tasks in csv files: words to rank, and a score."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [(f"{i} {'a ' * (i % 4)}{('good', 'bad')[i % 2]}", i % 2, (0.0, 2.5, 5.0)[i % 3]) for i in range(80)]
    for name in ("mood", "grade"):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label", "score"), *rows])
    tasks: list[dict[str, Any]] = [
        {"name": "mood", "path": str(folder / "mood.csv"), "template": "mood: {text}", "label_words": ["good", "bad"]},
        {"name": "grade", "path": str(folder / "grade.csv"), "input_columns": ["text"], "target_column": "score"},
    ]
    model = ["--model", "T5Module", "--model.backbone", str(t5_folder("untied")), "--model.max_new_tokens", "6"]
    return [*model, "--data", "TextTasks", "--data.tasks", json.dumps(tasks), "--data.cache_dir", str(folder)]


@pytest.fixture(scope="module")
def run(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "run"
    argv = ["fit", *settings, "--model.method", "l_lora", "--trainer.max_steps", "3"]
    argv += ["--fusion.rules", "[average, ties]", "--trainer.enable_progress_bar", "false"]
    assert main([*argv, "--trainer.default_root_dir", str(root)]) == 0
    return root


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["rows"]


def test_a_run_has_a_row_for_every_model_task_and_metric(run: Path) -> None:
    rows = rows_of(run)
    metrics = {("mood", "accuracy"), ("grade", "spearman"), ("grade", "pearson"), ("grade", "unparsable")}
    for model, rule in (("pretrained", None), ("finetuned", None), ("fused", "average"), ("fused", "ties")):
        found = {(row["task"], row["metric"]) for row in rows if (row["model"], row["rule"]) == (model, rule)}
        assert found == metrics
    assert (run / "results.md").is_file()
    assert (run / "plots" / "scores.png").is_file()
    loaded = T5ForConditionalGeneration.from_pretrained(run / "fused" / "ties")
    assert loaded.config.model_type == "t5"


@pytest.mark.parametrize("rule", ["average", "ties"])
def test_fused_folders_score_as_in_the_run(settings: list[str], run: Path, tmp_path: Path, rule: str) -> None:
    argv = ["test", *settings, "--model.weights", str(run / "fused" / rule)]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path)]) == 0
    scored = {(row["task"], row["metric"]): row["value"] for row in rows_of(tmp_path)}
    assert scored == {(row["task"], row["metric"]): row["value"] for row in rows_of(run) if row["rule"] == rule}


def test_fuse_offline_gives_the_folder_of_the_run(
    t5_folder: Callable[[str], Path], settings: list[str], run: Path, tmp_path: Path
) -> None:
    finetuned = {task: str(run / "adapters" / task) for task in ("mood", "grade")}
    argv = ["fuse", "--base", str(t5_folder("untied")), "--finetuned", json.dumps(finetuned), "--rule", "ties"]
    assert main([*argv, "--output", str(tmp_path / "fused")]) == 0
    T5ForConditionalGeneration.from_pretrained(tmp_path / "fused")
    argv = ["test", *settings, "--model.weights", str(tmp_path / "fused")]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "test")]) == 0
    scored = {(row["task"], row["metric"]): row["value"] for row in rows_of(tmp_path / "test")}
    assert scored == {(row["task"], row["metric"]): row["value"] for row in rows_of(run) if row["rule"] == "ties"}


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_predict_answers_texts(
    settings: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    text = "mood: a good\n\nmood: a a bad\n"
    (tmp_path / "texts.txt").write_text(text)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    argv = ["predict", *settings, "--model.weights", str(run / "fused" / "average"), "--trainer.default_root_dir"]
    argv += [str(tmp_path), "--data.texts", "-" if source == "standard input" else str(tmp_path / "texts.txt")]
    assert main([*argv, "--output", str(tmp_path / "answers.csv")]) == 0
    with (tmp_path / "answers.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert [answer["text"] for answer in answers] == ["mood: a good", "mood: a a bad"]
    assert list(answers[0]) == ["text", "answer"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.dtype", "float16"], "T5 overflows in float16"),
        (["--model.evaluation", "{mod: generate}"], "evaluation for unknown task 'mod'; did you mean 'mood'?"),
        (["--model.evaluation", "guess"], "evaluation"),
        (["--model.max_new_tokens", "1", "--model.evaluation", "generate"], "but max_new_tokens is 1; raise it"),
        (["--model.target_modules", "[q_proj]"], "target module 'q_proj' matches no layer"),
        (["--model.backbone", "google/flan-t5-bass/x"], "no model folder 'google/flan-t5-bass/x'"),
        (["--model.backbone", "tiny-clip"], "T5Module needs an encoder-decoder, a T5, and 'tiny-clip' is a CLIPModel"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    root = tmp_path / "run"
    argv = ["fit", *settings, *flags, "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"]
    assert main([*argv, "--trainer.default_root_dir", str(root)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fusionlab: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not root.exists()


def with_tone(settings: list[str]) -> list[str]:
    """A second task with classes, on the same table."""
    position = settings.index("--data.tasks") + 1
    mood, grade = json.loads(settings[position])
    tasks = [mood, grade, {**mood, "name": "tone", "template": "tone: {text}"}]
    return [*settings[:position], json.dumps(tasks), *settings[position + 1 :]]


@pytest.mark.parametrize("method", ["lora", "tangent"])
def test_diagnostics_are_of_the_tasks_with_classes(settings: list[str], tmp_path: Path, method: str) -> None:
    argv = ["fit", *with_tone(settings), "--model.method", method, "--model.learning_rate", "0.01"]
    argv += ["--fusion.diagnostics.grid_size", "3", "--fusion.rules", "[average]", "--trainer.max_steps", "2"]
    argv += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(tmp_path)]
    assert main(argv) == 0
    with (tmp_path / "diagnostics" / "plane_tasks.csv").open() as file:
        assert [line["task"] for line in csv.DictReader(file)] == ["mood", "tone"]
    with (tmp_path / "diagnostics" / "plane.csv").open() as file:
        plane = {(line["coefficient_1"], line["coefficient_2"]): line for line in csv.DictReader(file)}
    assert len(plane) == 9
    assert plane["0.0", "0.0"]["disentanglement_error"] == "0.0"
    assert len({line["loss_1"] for line in plane.values()}) == 9
    with (tmp_path / "diagnostics" / "cosines.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 3
    assert (tmp_path / "plots" / "plane_accuracy.png").is_file()


def test_a_plane_of_scores_is_refused_before_training(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["fit", *settings, "--fusion.diagnostics.num_batches", "1", "--trainer.max_steps", "2"]
    for more in ([], ["--fusion.diagnostics.tasks", "[mood, grade]"]):
        assert main([*argv, *more, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
        assert "counts classes, and grade has none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
