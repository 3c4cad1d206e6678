"""The README's Python example runs as it stands, and its commands exist."""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest

import fusionlab.data  # noqa: F401  # takes the Trainer that is there before one is put in its place
from fusionlab.__main__ import COMMANDS

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 13
    monkeypatch.chdir(tmp_path)
    short = example.replace("max_steps=100", "max_steps=2")
    assert short != example
    original = lightning.pytorch.Trainer

    def quiet(**arguments: Any) -> Any:
        return original(**arguments, logger=False, enable_progress_bar=False, enable_model_summary=False)

    monkeypatch.setattr(lightning.pytorch, "Trainer", quiet)
    names: dict[str, Any] = {}
    exec(compile(short, "README", "exec"), names)
    assert {row["task"] for row in names["rows"]} == {"digits", "signs"}
    assert all(0 <= row["value"] <= 1 for row in names["rows"])


def test_commands_exist() -> None:
    shown = set(re.findall(r"python -m fusionlab (\w+)", README))
    assert shown <= set(COMMANDS)
    assert {"fit", "test", "predict", "fuse"} <= shown
    assert len(README.splitlines()) <= 150
