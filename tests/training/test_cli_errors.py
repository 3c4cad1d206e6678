"""Bad input to the Lightning commands: one message on stderr, exit code 2, nothing written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusionlab.__main__ import main

CASES = {
    "unknown flag": (
        ["fit", "--trainer.max_stps", "3"],
        "unknown key 'trainer.max_stps'; did you mean 'trainer.max_steps'",
    ),
    "shortened flag": (["fit", "--overwrit"], "unknown key 'overwrit'; did you mean 'overwrite'"),
    "shortened flag of another command": (["test", "--harnes", "[x]"], "unknown key 'harnes'; did you mean 'harness'"),
    "unknown model key": (["fit", "--model.metod", "lora"], "unknown key 'metod' of ClipModule; did you mean 'method'"),
    "unknown key of another model": (
        ["fit", "--model", "T5Module", "--model.max_new_token", "3"],
        "model: unknown key 'max_new_token' of T5Module; did you mean 'max_new_tokens'",
    ),
    "unknown data key": (["fit", "--data", "TextTasks", "--data.promts", "paper"], "'promts' of TextTasks.*'prompts'"),
    "misspelt class": (["fit", "--modle.rank", "3"], "unknown key 'modle.rank'; did you mean 'model.rank'"),
    "dry run of test": (
        ["test", "--dry_run"],
        "--dry_run does nothing in test, only in fit, fuse, sweep; leave it out",
    ),
    "dry run of report": (["report", "x", "--dry_run"], "--dry_run does nothing in report, only in fit, fuse, sweep"),
    "unknown method": (["fit", "--model.method", "loar"], "method: no such choice 'loar'; did you mean 'lora'"),
    "wrong type": (["fit", "--trainer.max_steps", "many"], "trainer.max_steps: expected int, got 'many'"),
    "wrong optional": (["fit", "--trainer.enable_progress_bar", "0"], "enable_progress_bar: expected bool, got '0'"),
    "unknown task": (["fit", "--data.tasks", "[digitz]"], "digitz.*did you mean 'digits'"),
    "unknown task key": (["fit", "--data.tasks", "[{name: x, pth: y}]"], "pth"),
    "missing data path": (["fit", "--data.tasks", "[{name: x, path: ./nowhere}]"], "nowhere"),
    "unknown rule": (["fit", "--fusion.rules", "[metagtp]"], "metagtp.*did you mean 'metagpt'"),
    "bad rule name": (["fit", "--fusion.rules", "{../x: average}"], r"a rule's name is a folder's name, got '\.\./x'"),
    "unknown rule argument": (
        ["fit", "--fusion.rules", "{m: {class_path: metagpt, init_args: {scop: layer}}}"],
        "unknown argument 'scop'; did you mean 'scope'",
    ),
    "missing model": (["fit", "--model.backbone", "./no-model"], "no model folder './no-model'"),
    "unknown target": (["fit", "--model.target_modules", "[q_proj, v_prj]"], "'v_prj'.*did you mean 'v_proj'"),
    "missing weights": (["test", "--model.weights", "./no-weights"], "no folder 'no-weights'"),
    "missing config": (["fit", "--config", "no.yaml"], "no.yaml"),
    "rank zero": (["fit", "--model.rank", "0"], "rank must be at least 1, got 0"),
    "every zero epochs": (["fit", "--fusion.every_n_epochs", "0"], "every_n_epochs must be at least 1, got 0"),
    "no such reference": (["fit", "--fusion.full_reference", "nope"], "no results.json in 'nope'"),
    "unknown command": (["fti"], "no command 'fti'; did you mean 'fit'"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    code = main(argv)
    stderr = capsys.readouterr().err
    assert code == 2
    assert stderr.count("\n") == 1, stderr
    assert re.search(message, stderr), stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [["--help"], ["fuse", "--help"], ["report", "--help"]])
def test_a_reader_that_leaves_is_no_fault(argv: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "fusionlab", *argv]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
