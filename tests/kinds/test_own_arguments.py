"""Arguments of modules and data of another package mean what these say, also where ours have some of the same name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fusionlab.__main__ import main
from fusionlab.search.workbench import workbench

STEPS = ["--trainer.max_steps", "2", "--fusion.rules", "[average]", "--trainer.enable_progress_bar", "false"]


def fit(module: str, data: str = "own_regressor.Planes", *flags: str) -> int:
    return main(["fit", "--model", module, "--data", data, *STEPS, *flags])


OWN = {
    "heads, weights and backbone": ("own_named.Named", "own_regressor.Planes", []),
    "given ones": ("own_named.Named", "own_regressor.Planes", ["--model.heads", "2", "--model.weights", "x"]),
    "a number of tasks": ("own_regressor.Regressor", "own_named.Counted", []),
    "pictures": ("own_regressor.Regressor", "own_named.Counted", ["--data.images", "/tmp"]),
    "a metric that the module logs": (
        "own_named.Logging", "own_regressor.Planes",
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=own_loss"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OWN)
def test_names_of_ours_are_free_in_other_packages(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    module, data, flags = OWN[case]
    assert fit(module, data, *flags) == 0, capsys.readouterr().err
    run = f"{module.rpartition('.')[2]}-{'bilinear' if module.endswith('Named') else 'full'}-1"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run]
    assert (tmp_path / "runs" / run / "results.json").exists()


@pytest.mark.parametrize("flags", [["--model.weights", "x"], ["--data.images", "x"]], ids=str)
def test_they_are_ours_in_our_own(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *STEPS, *flags]) == 2
    assert "does nothing in fit" in capsys.readouterr().err


def test_a_number_of_tasks_names_no_jobs_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--train_only", "true", "--trainer.default_root_dir", str(tmp_path / "run")]
    assert fit("own_regressor.Regressor", "own_named.Counted", *flags) == 2
    assert "train_only: name the tasks to train" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a module that has a class for an argument."""
    run = tmp_path_factory.mktemp("nested") / "run"
    flags = ["--model.activation", "torch.nn.ReLU", "--data.batch_size", "8", "--data.eval_batch_size", "16"]
    assert fit("own_named.Nested", "own_regressor.Planes", *flags, "--trainer.default_root_dir", str(run)) == 0
    return run


def test_a_sweep_makes_classes_as_fit_does(nested: Path, tmp_path: Path) -> None:
    given = ["--runs", f"[{nested}]", "--rules", "[average]", "--processes", "1"]
    assert main(["sweep", *given, "--output", str(tmp_path / "of_runs")]) == 0
    model = {"class_path": "own_named.Nested", "init_args": {"activation": {"class_path": "torch.nn.ReLU"}}}
    fitted = {"model": model, "data": {"class_path": "own_regressor.Planes"}, "trainer": {"max_steps": 2}}
    recipe = {"output": str(tmp_path / "fitted"), "fit": fitted, "rules": ["average"], "processes": 1}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["sweep", "--config", str(tmp_path / "sweep.yaml")]) == 0
    found = [json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("of_runs", "fitted")]
    values = [[(row["task"], row["fused_tasks"], row["value"]) for row in rows] for rows in found]
    assert values[0] == values[1]


@pytest.mark.parametrize("seed", [None, 7])
def test_what_a_module_draws_is_what_fit_draws(seed: int | None, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seeded = [] if seed is None else ["--seed_everything", str(seed)]
    rules = "{part: {class_path: task_arithmetic, init_args: {scaling_coefficient: 0.3}}}"  # which the base is part of
    fitted = [*seeded, "--trainer.max_steps", "2", "--fusion.rules", rules, "--trainer.default_root_dir", str(run)]
    assert main(["fit", "--model", "own_named.Drawn", "--data", "own_regressor.Planes", *fitted]) == 0
    flags = ["--runs", f"[{run}]", "--rules", rules, "--sizes", "[3]", "--processes", "1"]
    assert main(["sweep", *flags, "--output", str(tmp_path / "out")]) == 0
    ours, theirs = (json.loads((path / "results.json").read_text())["rows"] for path in (run, tmp_path / "out"))
    of_run = {row["task"]: row["value"] for row in ours if row["model"] == "fused"}
    assert {row["task"]: row["value"] for row in theirs if row["model"] == "fused"} == pytest.approx(of_run)
    config = {"model": {"class_path": "own_named.Drawn"}, "data": {"class_path": "own_regressor.Planes"}}
    bias = workbench(config | ({} if seed is None else {"seed_everything": seed})).base["0.bias"]
    assert set(bias.tolist()) == {float(42 if seed is None else seed)}


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"class_path": "own_named.Nothing"}, "model: no class 'own_named.Nothing'"),
        ({"class_path": "nowhere.Mine"}, "model: no class 'nowhere.Mine': No module named 'nowhere'"),
        (
            {"class_path": "ClipModule", "rank": 8},
            "unknown key 'rank' beside class_path; give {init_args: {rank: ...}}",
        ),
        ({"rank": 8}, "unknown key 'rank' beside class_path"),
    ],
    ids=str,
)
def test_what_makes_no_module_is_told_so(
    model: dict, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"output": str(tmp_path / "out"), "fit": {"model": model}, "rules": ["average"]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["sweep", "--config", str(tmp_path / "sweep.yaml")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_defaults_are_the_classes_own(tmp_path: Path) -> None:
    """Where ours have an argument of the same name with another default."""
    run = tmp_path / "run"
    assert fit("own_named.Named", "own_regressor.Planes", "--trainer.default_root_dir", str(run)) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["method"] == "bilinear"
    assert config["data"]["init_args"] == {"batch_size": 8, "eval_batch_size": 16}
