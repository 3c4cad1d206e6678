"""``fit --dry_run`` decides by the code of the run, tells what it would do, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusionlab.__main__ import main

FEW = ["--data.max_samples", "12", "--data.batch_size", "4", "--trainer.max_steps", "3"]
FITS: dict[str, list[str]] = {
    "clip": ["--data.tasks", "[digits, signs]"],
    "clip full": ["--data.tasks", "[digits, signs]", "--model.method", "full"],
    "clip tangent": ["--data.tasks", "[digits, glyphs]", "--model.method", "tangent_lora"],
    "t5": ["--model", "T5Module", "--data", "TextTasks", "--data.tasks", "[sentiment, inference]"],
    "t5 l_lora": ["--model=T5Module", "--data=TextTasks", "--data.tasks", "[sentiment]", "--model.method", "l_lora"],
}  # fmt: skip
BAD: dict[str, list[str]] = {
    "a rule for two tasks": ["--data.tasks", "[digits, signs, glyphs]", "--fusion.rules", "[slerp]"],
    "no such task": ["--data.tasks", "[digit]"],
    "no such file": ["--data.tasks", json.dumps([{"name": "x", "path": "nowhere"}])],
    "no such layer": ["--data.tasks", "[digits]", "--model.target_modules", "[nowhere]"],
    "a method of other data": ["--data.tasks", "[digits]", "--model", "T5Module"],
}


@pytest.mark.parametrize("case", FITS)
def test_what_passes_is_told_and_nothing_is_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *FITS[case], *FEW, "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "3 updates" in told
    assert "12 train, 12 validation, 12 test; loss of the first batch" in told
    assert "memory of each process: weights" in told
    assert "not yet checked" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_refused_by_the_run_too(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    messages = []
    for more in (["--dry_run"], []):
        assert main(["fit", *BAD[case], *FEW, *more]) == 2
        messages.append(capsys.readouterr().err)
        assert list(tmp_path.iterdir()) == []
    assert messages[0] == messages[1] != ""


def test_a_run_that_is_there_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "fit",
        *FITS["clip"],
        *FEW,
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
        "--fusion.rules",
        "[average]",
    ]
    assert main([*argv, "--trainer.enable_progress_bar", "false"]) == 0
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    capsys.readouterr()
    assert main([*argv, "--trainer.max_steps", "4", "--dry_run"]) == 2  # a finished run of another configuration
    assert main([*argv, "--overwrite", "--dry_run"]) == 0
    assert str(tmp_path / "run") in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands_refuse_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, *FITS["clip"], "--dry_run", "--output", "rows.json"]) == 2
    assert "--dry_run does nothing in" in capsys.readouterr().err
