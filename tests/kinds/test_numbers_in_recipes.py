"""Numbers in YAML and in recipes: read alike by all commands, and refused where they are none or do nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml

from fusionlab.__main__ import main
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.errors import InputError
from fusionlab.foreign import parse_yaml, yaml_of
from fusionlab.runs.folder import RunFolder

SPELLINGS = [
    "1e-3", "1E5", "1e5", "-1e-3", "+1e5", ".5", ".5e3", ".5e+3", "1.", "1.5e-3", "1.5e3", "-.5", "+.inf", "-.inf",
    ".nan", "2026-01-31", "1:30.5", "1_0.5", "0x1f", "010", "1e", "e5", "12e45", "1.2.3", "-", "nan", "1e-3x", "~",
    "on",
]  # fmt: skip


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_value_is_what_fit_takes_it_for(text: str) -> None:
    of_fit = jsonargparse.get_loader("yaml")
    assert repr(parse_yaml(text, "it")) == repr(of_fit(text))
    written = yaml_of({"a": text, "b": [text]})
    assert parse_yaml(written, "it") == {"a": text, "b": [text]} == of_fit(written)


def test_a_runs_configuration_comes_back(tmp_path: Path) -> None:
    config = {"model": {"class_path": "Mine", "init_args": {"revision": "12e4", "rate": 1e-6, "seed": None}}}
    folder = RunFolder(tmp_path)
    folder.begin(config, "new", [], overwrite=False)
    assert folder.config() == config
    assert folder.check(config) == "unfinished"


@pytest.mark.parametrize("rate", ["1e-3", "0.001"])
def test_a_recipe_takes_a_number_as_fit_does(rate: str, tmp_path: Path) -> None:
    (tmp_path / "fit.yaml").write_text(f"model: {{init_args: {{learning_rate: {rate}}}}}\n")
    recipe = SweepRecipe("out", fit=str(tmp_path / "fit.yaml"))
    assert recipe.fit_config("lora", 1, tmp_path)["model"]["init_args"]["learning_rate"] == 0.001


@pytest.mark.parametrize(
    "rule",
    [
        "{class_path: karcher, init_args: {tolerance: 1e-5}}",
        '{"class_path": "karcher", "init_args": {"tolerance": 1e-5}}',
    ],
)
@pytest.mark.parametrize("as_flag", [True, False])
def test_so_does_a_rules_argument(rule: str, as_flag: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuse = ["fuse", "--base", "nowhere", "--finetuned.a", "nowhere", "--output", str(tmp_path / "out"), "--dry_run"]
    (tmp_path / "rule.yaml").write_text(f"rule: {rule}\n")
    argv = [*fuse, "--rule", rule] if as_flag else [*fuse, "--config", str(tmp_path / "rule.yaml")]
    assert main(argv) == 2
    assert "'nowhere'" in capsys.readouterr().err  # and nothing of the rule
    assert main([*fuse, "--rule", "karcher", "--rule.tolerance", "1e-5"]) == 2
    assert "'nowhere'" in capsys.readouterr().err


NAN, INF = math.nan, math.inf
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a coefficient": ({"scaling_coefficients": [0.0, NAN]}, "scaling_coefficients: expected a finite number, got nan"),
    "a time": ({"budget_minutes": INF}, "budget_minutes: expected a finite number, got inf"),
    "a rule's": ({"rules": {"a": {"class_path": "ties", "init_args": {"density": NAN}}}}, "ties.density: expected"),
    "of fit": (
        {"fit": {"model": {"init_args": {"learning_rate": NAN}}}},
        "fit.model.init_args.learning_rate: expected",
    ),
    "of a method": (
        {"by_method": {"lora": {"trainer": {"gradient_clip_val": INF}}}},
        "by_method.lora.trainer.gradient_clip_val",
    ),
    "a trial": ({"fit": {"trainer": {"fast_dev_run": True}}}, "fit.trainer.fast_dev_run True keeps no run to fuse"),
    "a limit": ({"fit": {"trainer": {"limit_test_batches": 1}}}, "limit_test_batches 1 would score a part of what"),
    "a share": (
        {"by_method": {"lora": {"trainer": {"limit_test_batches": 0.5}}}},
        "limit_test_batches 0.5 would score",
    ),
    "a plan": ({"fit": {"dry_run": True}}, "fit.dry_run leaves no scored run to fuse"),
    "a job": ({"fit": {"train_only": True}}, "fit.train_only leaves no scored run to fuse"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_sweep_refuses_what_gives_no_scores(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, told = REFUSED[case]
    recipe = {"output": str(tmp_path / "out"), "methods": ["lora"], "rules": ["task_arithmetic"], **given}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["sweep", "--config", str(tmp_path / "sweep.yaml")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [None, 1.0])
def test_no_limit_is_none(value: float | None) -> None:
    recipe = SweepRecipe("out", {"trainer": {"limit_test_batches": value, "fast_dev_run": False}, "dry_run": False})
    assert recipe.config("lora")["trainer"]["limit_test_batches"] == value


def test_a_number_of_subsets_is_of_a_size_of_the_sweep() -> None:
    tasks = ["a", "b", "c"]
    with pytest.raises(
        InputError, match=r"subsets_per_size: expected sizes of this sweep \(2\), got 3, 7; leave those"
    ):
        SweepRecipe("out", subsets_per_size={7: 1, 3: 1, 2: 1}, sizes=[2]).subsets(tasks)
    with pytest.raises(InputError, match=r"subsets_per_size: expected sizes of this sweep \(2, 3\), got 7"):
        SweepRecipe("out", subsets_per_size={7: 1}).subsets(tasks)
    assert len(SweepRecipe("out", subsets_per_size={2: 1}).subsets(tasks)) == 2


@pytest.mark.parametrize(
    "flags", [["--scaling_coefficients", "[0, .nan]"], ["--fit.trainer.gradient_clip_val", ".inf"]]
)
def test_so_does_a_flag(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--output", str(tmp_path / "out"), *flags]) == 2
    assert "expected a finite number, got" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
