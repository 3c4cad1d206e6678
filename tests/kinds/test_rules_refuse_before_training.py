"""A rule that does not fit the tasks is refused by `fit` before anything is trained, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusionlab.__main__ import main

REFUSED: dict[str, tuple[Any, str]] = {
    "slerp of three": ("slerp", "slerp is between two models, got 3: digits, signs, textures"),
    "more to agree than tasks": (
        {"class_path": "consensus", "init_args": {"min_tasks": 4}}, "at least 4 tasks need, got 3",
    ),
    "a coefficient for no task": (
        {"class_path": "task_arithmetic", "init_args": {"scaling_coefficient": {"digits": 0.3}}},
        "has no value for signs, textures",
    ),
    "under a transform": (
        {"class_path": "dare", "init_args": {"rule": "slerp", "drop_rate": 0.1}}, "slerp is between two models",
    ),
    "a transform's own": (
        {"class_path": "dare", "init_args": {"rule": "average", "drop_rate": {"digits": 0.5}}},
        "dare.drop_rate has no value for 'signs'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule, message = REFUSED[case]
    argv = ["fit", "--data.tasks", json.dumps(["digits", "signs", "textures"]), "--data.max_samples", "8"]
    argv += ["--trainer.max_steps", "1", "--trainer.default_root_dir", str(tmp_path / "run")]
    argv += ["--fusion.rules", json.dumps({"mine": rule})]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
