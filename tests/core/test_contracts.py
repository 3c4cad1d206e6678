"""Modules and data of other packages: what they must have, and that every command runs on them."""

import ast
import json
import math
from pathlib import Path

import own_regressor
import pytest
import structure
from lightning.pytorch import LightningDataModule, LightningModule

from fusionlab.__main__ import main
from fusionlab.contracts import as_data, as_module

OWN = ["--model", "own_regressor.Regressor", "--data", "own_regressor.Planes"]
TYPED = ("module", "pl_module", "data", "backbone", "metrics")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "run"
    rules = ["--fusion.rules", "[average, task_arithmetic, ties]", "--trainer.max_steps", "60"]
    assert main(["fit", *OWN, *rules, "--trainer.default_root_dir", str(folder)]) == 0
    return folder


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def test_fit_fuses_and_scores_weights_of_a_module_that_it_does_not_know(run: Path) -> None:
    rows = rows_of(run / "results.json")
    values = {(row["model"], row["rule"], row["task"]): row["value"] for row in rows}
    tasks = list(own_regressor.Planes().tasks)
    assert {row["metric"] for row in rows} == {"squared_error"}
    assert {row["num_samples"] for row in rows} == {40}
    for task in tasks:
        assert values["finetuned", None, task] < 0.2 * values["pretrained", None, task]
    assert {row["higher_is_better"] for row in rows} == {False}
    errors = {rule: [values["fused", rule, task] for task in tasks] for rule in ("task_arithmetic", "average")}
    assert math.prod(errors["task_arithmetic"]) < 1.2 * math.prod(errors["average"])  # the smallest, not the largest
    assert not (run / "heads").exists()
    assert sorted(path.name for path in (run / "finetuned").iterdir()) == tasks
    assert sorted(path.name for path in (run / "fused").iterdir()) == ["average", "task_arithmetic", "ties"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_scores_by_class_path_are_those_of_the_run(run: Path, tmp_path: Path, command: str) -> None:
    weights = ["--model.weights", str(run / "fused" / "average"), "--output", str(tmp_path / "rows.json")]
    assert main([command, *OWN, *weights]) == 0
    rows = rows_of(tmp_path / "rows.json")
    assert [row["split"] for row in rows] == ["validation" if command == "validate" else "test"] * 3
    if command == "test":
        before = [row["value"] for row in rows_of(run / "results.json") if row["rule"] == "average"]
        assert [row["value"] for row in rows] == pytest.approx(before)


def test_predict_writes_the_rows_of_any_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", *OWN, "--output", str(tmp_path / "out.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    module, inputs = own_regressor.Regressor(), own_regressor.Planes().splits["plane 0"]["test"].inputs
    assert [line["value"] for line in lines] == pytest.approx(module(inputs).tolist(), abs=1e-3)
    capsys.readouterr()
    silent = ["--model", "own_regressor.Silent", *OWN[2:]]
    assert main(["predict", *silent, "--output", str(tmp_path / "none.csv")]) == 2
    assert "Silent.predict_step must return a list of mappings for each batch, got Tensor" in capsys.readouterr().err
    assert not (tmp_path / "none.csv").exists()
    two = ["--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    assert main(["predict", *OWN, *two, "--output", str(tmp_path / "none.csv")]) == 2
    assert "predict runs in one process, got 2; give --trainer.devices 1" in capsys.readouterr().err


def test_sweep_and_report(run: Path, tmp_path: Path) -> None:
    rules = ["--rules", "[average, metagpt_multiplier]"]  # of which one is a search
    assert main(["sweep", "--runs", f"[{run}]", "--output", str(tmp_path / "given"), *rules]) == 0
    fit = {"model": {"class_path": OWN[1]}, "data": {"class_path": OWN[3]}, "trainer": {"max_steps": 60}}
    recipe = {"output": str(tmp_path / "fitted"), "fit": fit, "methods": ["full"], "rules": ["average"]}
    (tmp_path / "sweep.yaml").write_text(json.dumps(recipe))
    assert main(["sweep", "--config", str(tmp_path / "sweep.yaml")]) == 0
    for name in ("given", "fitted"):
        points = [row for row in rows_of(tmp_path / name / "results.json") if row["rule"] == "average"]
        assert {tuple(row["fused_tasks"]) for row in points} >= {
            ("plane 0", "plane 1"),
            ("plane 0", "plane 1", "plane 2"),
        }
    for folder in (run, tmp_path / "fitted"):
        assert main(["report", str(folder), "--output", str(tmp_path / "report")]) == 0
    assert "base model: regressor" in (tmp_path / "report" / "report.md").read_text()


class Half(LightningModule):
    """Less than a module."""

    task_parameters: dict = {}  # noqa: RUF012


def test_missing_members_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    boring = "lightning.pytorch.demos.boring_classes"
    assert main(["fit", "--model", f"{boring}.BoringModel", "--data", OWN[3]]) == 2
    told = capsys.readouterr().err
    assert "BoringModel lacks members backbone, " in told
    assert "see fusionlab.contracts.Module" in told
    assert "; and method, " in told.partition("which fusionlab.contracts.ModuleDefaults gives")[0]
    assert main(["fit", "--model", OWN[1], "--data", f"{boring}.BoringDataModule"]) == 2
    assert "BoringDataModule lacks members batch_size, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "ClipModul"], "model: no class 'ClipModul'; did you mean 'ClipModule'?"),
        (["--data", "ImageTask"], "data: no class 'ImageTask'; did you mean 'ImageTasks'?"),
        (["--model", "own_regressor.Planes"], "model: own_regressor.Planes is no LightningModule"),
        (["--model", "nowhere.Mine"], "model: nowhere.Mine: No module named 'nowhere'"),
        (["--data", "own_regressor.Mine"], "data: own_regressor.Mine: module 'own_regressor' has no attribute 'Mine'"),
    ],
    ids=str,
)
def test_a_class_that_is_none_is_told_so(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *flags]) == 2
    assert told in capsys.readouterr().err


def test_defaults_leave_what_is_asked_of_everyone() -> None:
    with pytest.raises(ValueError, match=r"^Half lacks members backbone, .*, activate, .* module contract") as error:
        as_module(Half())
    assert "task_parameters" not in str(error.value)
    with pytest.raises(ValueError, match=r"LightningDataModule lacks members tasks, .* and training_tasks, "):
        as_data(LightningDataModule())
    assert as_module(module := own_regressor.Regressor()) is module
    assert as_data(data := own_regressor.Planes()) is data


def untyped(path: Path) -> list[str]:
    """Parameters and fields of what a contract says that are annotated as anything."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.arg):
            name, annotation = node.arg, node.annotation
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name | ast.Attribute):
            name = node.target.id if isinstance(node.target, ast.Name) else node.target.attr
            annotation = node.annotation
        else:
            continue
        said = ast.unparse(annotation) if annotation is not None else ""
        if name.strip("_") in TYPED and {"Any", "object"} & set(said.split(" | ")):
            found.append(f"{name}: {said}")
    return found


@pytest.mark.parametrize("module", structure.modules_of(structure.PACKAGE))
def test_what_a_contract_says_is_typed_so(module: str) -> None:
    assert not untyped(structure.modules_of(structure.PACKAGE)[module])
