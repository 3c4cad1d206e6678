"""A command that is refused, or fails, leaves what was there; and what is trained is not trained over unasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusionlab.__main__ import main
from fusionlab.layout import OVERWRITTEN
from fusionlab.runs.folder import RunFolder
from fusionlab.runs.leases import Leases

FIT = [
    "fit", "--data.max_samples", "16", "--data.batch_size", "4", "--model.rank", "2", "--fusion.rules", "[average]",
    "--trainer.enable_progress_bar", "false",
]  # fmt: skip


def fit(root: Path, *extra: str) -> int:
    known = {"--trainer.max_steps": "2", "--data.tasks": "[digits, signs]"}
    more = [part for flag, value in known.items() if flag not in extra for part in (flag, value)]
    try:
        return main([*FIT, "--trainer.default_root_dir", str(root), *more, *extra])
    except FloatingPointError:
        return 1


def content(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and "leases" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    assert fit(tmp_path / "run") == 0
    return tmp_path / "run"


REFUSED = {
    "an interval beyond the epoch": ("--trainer.val_check_interval", "100", "--trainer.limit_val_batches", "1"),
    "no batch": ("--trainer.limit_train_batches", "0.0001"),
    "a loss that is not finite": ("--model.learning_rate", "1e30", "--model.num_warmup_steps", "0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_is_overwritten_by_something_only(run: Path, case: str) -> None:
    before = content(run)
    assert fit(run, "--overwrite", "--trainer.max_steps", "6", *REFUSED[case]) != 0
    assert content(run) == before
    assert fit(run, "--overwrite", "--model.learning_rate", "0.01") == 0
    assert not (run / OVERWRITTEN).exists()
    assert content(run)["results.json"] != before["results.json"]


def test_what_was_put_aside_outlives_a_kill(tmp_path: Path) -> None:
    """Killed before there was a checkpoint, and begun anew: the run that comes back is the first one."""
    folder = RunFolder(tmp_path)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "a").write_text("first")
    folder.begin({"data": {}}, "new", [], overwrite=True)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "a").write_text("second")
    folder.begin({"data": {}}, "new", [], overwrite=True)
    folder.take_back()
    assert {path.name: path.is_dir() for path in tmp_path.iterdir()} == {"adapters": True}
    assert (tmp_path / "adapters" / "a").read_text() == "first"


def test_tasks_of_a_finished_run_are_not_trained_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(run)
    assert fit(run, "--train_only", "--data.tasks", "[digits]", "--model.learning_rate", "0.5") == 2
    assert "digits: trained already in" in capsys.readouterr().err
    assert content(run) == before


def test_tasks_of_another_job_are_not_trained_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "--train_only", "--data.tasks", "[digits]") == 0
    before = content(tmp_path)
    assert fit(tmp_path, "--train_only") == 2
    assert "digits: trained already in" in capsys.readouterr().err
    assert content(tmp_path) == before


def test_outputs_take_no_other_s_place(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(run)
    common = ["--data.tasks", "[digits]", "--data.max_samples", "8"]
    root = ["--trainer.default_root_dir", str(tmp_path / "other")]
    for name in ("results.json", "config.yaml"):
        assert main(["test", *common, *root, "--output", str(run / name)]) == 2
        assert f"is {name} of the run in" in capsys.readouterr().err
    prompts = tmp_path / "texts.txt"
    prompts.write_text("one\n")
    flags = ["--model", "T5Module", "--data", "TextTasks", "--data.texts", str(prompts)]
    assert main(["predict", *flags, "--output", str(prompts)]) == 2
    assert "is among what is read, data.texts" in capsys.readouterr().err
    assert prompts.read_text() == "one\n"
    assert main(["sweep", "--output", str(run), "--runs", json.dumps([str(run)]), "--dry_run"]) == 2
    assert "is the folder of a run" in capsys.readouterr().err
    assert content(run) == before


def test_a_dry_run_goes_on_where_the_run_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "--train_only", "--data.tasks", "[digits]") == 0
    before = content(tmp_path)
    for tasks in ("[digits, signs]", "[digits]"):  # one more than is trained, and nothing left to train
        capsys.readouterr()
        assert fit(tmp_path, "--dry_run", "--data.tasks", tasks) == 0
        assert "digits: 16 train, 16 validation, 16 test; trained by an earlier job" in capsys.readouterr().out
        assert content(tmp_path) == before
    assert fit(tmp_path, "--data.tasks", "[digits]") == 0
    assert fit(tmp_path, "--dry_run") == 0  # with a task more
    assert fit(tmp_path) == 0
    (tmp_path / "results.json").unlink()
    capsys.readouterr()
    assert fit(tmp_path, "--dry_run") == 0
    assert "would go on with" in capsys.readouterr().out
    assert not (tmp_path / "results.json").exists()


def test_a_living_process_keeps_what_it_is_writing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = run / "checkpoints" / ".last.ckpt.tmp-host-1-0000"
    (run / "results.json").unlink()
    half.write_text("")
    leases = Leases(run / "leases")
    leases.take_tasks(["digits"])
    assert fit(run) == 2
    assert "digits" in capsys.readouterr().err
    assert half.exists()
    leases.close()
    assert fit(run) == 0
    assert not half.exists()


def test_a_dry_run_takes_a_callback_that_keeps_checkpoints(tmp_path: Path) -> None:
    callback = json.dumps([{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}])
    assert fit(tmp_path / "run", "--dry_run", "--trainer.callbacks", callback) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("joined", [True, False])
def test_a_flag_of_one_key_leaves_the_file_s_others(tmp_path: Path, joined: bool, monkeypatch: Any) -> None:
    recipe = {
        "output": str(tmp_path / "out"),
        "fit": {"model": {"class_path": "ClipModule", "init_args": {"rank": 4, "learning_rate": 0.001}},
                "data": {"class_path": "ImageTasks", "init_args": {"tasks": ["digits", "signs"]}}},
        "methods": ["lora"],
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(recipe))
    seen: list[Any] = []
    monkeypatch.setattr("fusionlab.commands.sweep.command.sweep", lambda given, verbose: seen.append(given))
    flags = [("--fit.model.init_args.rank", "2"), ("--fit.data.init_args.max_samples", "40"),
             ("--by_method.lora.model.init_args.dropout", "0.1")]  # fmt: skip
    argv = [f"{name}={value}" for name, value in flags] if joined else [part for flag in flags for part in flag]
    assert main(["sweep", "--config", str(tmp_path / "sweep.yaml"), *argv]) == 0
    [given] = seen
    assert given.fit["model"]["init_args"] == {"rank": 2, "learning_rate": 0.001}
    assert given.fit["data"]["init_args"] == {"tasks": ["digits", "signs"], "max_samples": 40}
    assert given.by_method == {"lora": {"model": {"init_args": {"dropout": 0.1}}}}
    assert main(["sweep", "--config", str(tmp_path / "sweep.yaml"), *argv, *argv]) == 2
