"""``fuse`` with rules that look at data: what ``fit`` found from the same models and data, or what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS


def of(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


TASKS = ["digits", "signs"]
SIZES = {"max_samples": 16, "eval_batch_size": 8}
RULES: dict[str, Any] = {
    "open": of("dare", rule="task_arithmetic", drop_rate=0.5),
    "lorahub": of("lorahub", budget=3, num_samples=5),
    "multiplier": of("metagpt_multiplier", grid=[0.5, 1.0]),
    "adamerging": of("adamerging", num_steps=2, batch_size=4, learning_rate=0.1),
    "regmean": of("regmean", num_samples=5),
    "regmean_plus_plus": of("regmean_plus_plus", num_samples=3),
    "fisher": of("fisher", num_samples=3),
}
DATA = ["--data", "ImageTasks", "--data.tasks", json.dumps(TASKS), *(f"--data.{k}={v}" for k, v in SIZES.items())]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "run"
    argv = ["fit", *DATA, "--data.batch_size", "4", "--model.learning_rate", "0.01", "--trainer.max_steps", "3"]
    argv += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(root)]
    assert main([*argv, "--fusion.rules", json.dumps(RULES)]) == 0
    return root


def fuse(run: Path, output: Path, rule: Any, *more: str) -> int:
    argv = [
        "fuse",
        "--base",
        "tiny-clip",
        "--output",
        str(output),
        "--rule",
        rule if isinstance(rule, str) else json.dumps(rule),
    ]
    return main([*argv, *(f"--finetuned.{task}={run / 'adapters' / task}" for task in TASKS), *more])


CELLS = [pytest.param(name, marks=[pytest.mark.slow] if name in ("regmean", "fisher") else []) for name in RULES]


@pytest.mark.parametrize("name", CELLS)
def test_it_finds_and_writes_what_fit_does(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fuse(run, tmp_path / "out", RULES[name], "--model", "ClipModule", *DATA, "--dry_run") == 0
    split = "train" if name in ("regmean", "regmean_plus_plus", "fisher") else "validation"
    assert f"looks at        {split} samples: 16 of digits, 16 of signs" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert fuse(run, tmp_path / "out", RULES[name], "--model", "ClipModule", *DATA) == 0
    own, others = (json.loads((path / "fusion.json").read_text()) for path in (run / "fused" / name, tmp_path / "out"))
    assert others["rule"] == own["rule"]
    assert others["scaling_coefficients"] == own["scaling_coefficients"]
    assert {key: others["search"][key] for key in own["search"]} == own["search"]
    [file] = (tmp_path / "out").glob("*model.safetensors")
    fused, expected = load_file(file), load_file(run / "fused" / name / file.name)
    assert fused.keys() == expected.keys()
    assert all(bool((fused[key] == expected[key]).all()) for key in fused)


def test_another_base_is_insisted_on_for_the_models_that_are_run_too(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ASSETS / "tiny-clip", tmp_path / "moved")
    state = load_file(tmp_path / "moved" / "model.safetensors")
    moved = {name: value * 1.5 if value.is_floating_point() else value for name, value in state.items()}
    save_file(moved, tmp_path / "moved" / "model.safetensors", {"format": "pt"})
    argv = ["fuse", "--base", str(tmp_path / "moved"), "--output", str(tmp_path / "out")]
    argv += ["--rule", json.dumps(RULES["lorahub"]), "--model", "ClipModule", *DATA]
    argv += [f"--finetuned.{task}={run / 'adapters' / task}" for task in TASKS]
    assert main(argv) == 2
    assert "was made for another base" in capsys.readouterr().err
    assert main([*argv, "--allow_other_base"]) == 0
    record = json.loads((tmp_path / "out" / "fusion.json").read_text())
    assert record["allow_other_base"]
    assert record["search"]["num_samples"] == 10


REFUSED: dict[str, tuple[Any, list[str], str]] = {
    "nothing": ("lorahub", [], "rule lorahub looks at data; give model and data"),
    "no data": ("adamerging", ["--model", "ClipModule"], "rule adamerging looks at data; give data"),
    "no inputs": ("regmean", [], "rule regmean looks at data; give model and data"),
    "statistics": ("fisher", ["--model", "ClipModule", *DATA, "--memory_budget", "9.5MB"], "the budget is 9,500,000"),
    "no model": ("task_arithmetic", DATA, "model: needed beside data to choose the coefficient of task_arithmetic"),
    "no need": ("average", ["--model", "ClipModule", *DATA], "model and data: rule average looks at no data"),
    "an argument alone": ("average", ["--model.rank", "4"], "--model.rank: give --model too"),
    "other tasks": (
        "lorahub",
        ["--model", "ClipModule", "--data", "ImageTasks", "--data.tasks", "[digits, glyphs]"],
        "the tasks are digits, glyphs, and finetuned has digits, signs",
    ),
    "other kind": ("lorahub", ["--model", "T5Module", *DATA], "T5Module"),
    "another base": ("lorahub", ["--model", "ClipModule", "--model.backbone", "tiny-t5", *DATA], "is not the recipe's"),
    "memory": ("lorahub", ["--model", "ClipModule", *DATA, "--memory_budget", "9MB"], "and the budget is 9,000,000"),
    "misspelt": (
        "lorahub",
        ["--model", "ClipModule", "--model.rnk", "4", *DATA],
        "model: unknown key 'rnk' of ClipModule; did you mean 'rank'",
    ),
    "no such rule": ("lorahubb", ["--model", "ClipModule", *DATA], "no such rule"),
}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_or_too_much_is_refused(
    case: str, dry_run: bool, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule, more, expected = REFUSED[case]
    assert fuse(run, tmp_path / "out", rule, *more, *(["--dry_run"] if dry_run else [])) == 2
    message = capsys.readouterr().err
    assert expected in message, message
    assert not (tmp_path / "out").exists()
