"""A key with nothing behind it (`methods:`) is refused by name wherever it needs a value; never a traceback."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import fusionlab
from fusionlab.__main__ import main
from fusionlab.commands.fuse.recipe import Recipe
from fusionlab.commands.push import PushRecipe
from fusionlab.commands.report import ReportRecipe
from fusionlab.commands.sweep.recipe import SweepRecipe

RECIPES = {"fuse": Recipe, "push": PushRecipe, "report": ReportRecipe, "sweep": SweepRecipe}
GIVEN: dict[str, dict[str, Any]] = {
    "fuse": {"base": "nowhere", "finetuned": {"a": "nowhere"}, "output": "out"},
    "push": {"folder": "nowhere", "repo": "a/b"},
    "report": {"runs": ["nowhere"]},
    "sweep": {"output": "out", "dry_run": True, "runs": ["nowhere"]},
}
NEEDED = [
    (command, field.name)
    for command, recipe in RECIPES.items()
    for field in dataclasses.fields(recipe)
    if "None" not in str(field.type)
]


def run(command: str, content: dict[str, Any], folder: Path, *flags: str) -> int:
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(content))
    return main([command, "--config", str(path), *flags])


@pytest.mark.parametrize(("command", "key"), NEEDED)
def test_of_a_recipe(command: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, {**GIVEN[command], key: None}, tmp_path) == 2
    message = capsys.readouterr().err
    assert (f"{key}: expected " in message and "got null" in message) or f"missing: {key}" in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["given.yaml"]


@pytest.mark.parametrize(("command", "key"), [("fuse", "rule"), ("sweep", "seeds")])
def test_from_python(command: str, key: str) -> None:
    call = {"fuse": fusionlab.fuse_checkpoints, "sweep": fusionlab.sweep}[command]
    with pytest.raises(fusionlab.InputError, match=f"{key}: expected .*, got null"):
        call(GIVEN[command] | {key: None})


OF_FIT = [
    "model.init_args.rank", "model.init_args.weight_decay", "model.init_args.lr_schedule", "data.init_args.batch_size",
    "data.init_args.on_bad_image", "fusion.finetuned_on", "fusion", "trainer", "train_only",
]  # fmt: skip


def with_nothing(key: str) -> dict[str, Any]:
    content: Any = None
    for part in reversed(key.split(".")):
        content = {part: content}
    return dict(content)


@pytest.mark.parametrize("key", OF_FIT)
def test_of_fit(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [] if key == "trainer" else ["--trainer.default_root_dir", str(tmp_path / "run")]
    assert run("fit", with_nothing(key), tmp_path, *flags) == 2
    message = capsys.readouterr().err
    assert re.search(rf"{key.replace('init_args.', '')}: expected .*, got null", message), message
    assert [path.name for path in tmp_path.iterdir()] == ["given.yaml"]


@pytest.mark.parametrize("key", OF_FIT[:5])
@pytest.mark.parametrize("value", [None, {"a": 1}])
def test_of_what_a_sweep_fits(key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = json.loads(json.dumps(with_nothing(key)).replace("null", json.dumps(value)))
    assert run("sweep", {"output": str(tmp_path / "out"), "fit": fit, "methods": ["lora"]}, tmp_path) == 2
    assert f"{key.replace('init_args.', '')}: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["given.yaml"]
