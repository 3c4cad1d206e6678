"""Errors, better where they are lower: of a regressor of another package, by its mean squared error."""

import json
from pathlib import Path
from typing import Any

import pytest

from fusionlab.__main__ import main
from fusionlab.commands.sweep.choosing import share_of_all
from fusionlab.reporting.protocols import Denominators, Score, measure
from fusionlab.reporting.reference import normalize
from fusionlab.reporting.results import best_cells

OWN = ["--model", "own_regressor.Regressor", "--data", "own_regressor.Planes"]
GRID = [0.1, 0.4, 0.7, 1.0]


def row(task: str, metric: str, value: float, **fields: Any) -> dict[str, Any]:
    known = {"model": "fused", "rule": "average", "split": "test", "num_samples": 8, "finetuned_on": None}
    return known | {"task": task, "metric": metric, "value": value, "higher_is_better": metric != "error"} | fields


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "run"
    flags = ["--fusion.rules", "[task_arithmetic]", "--trainer.max_steps", "60"]
    assert main(["fit", *OWN, *flags, "--trainer.default_root_dir", str(folder)]) == 0
    return folder


def test_a_coefficient_chosen_in_fit_has_the_lowest_error(run: Path) -> None:
    record = json.loads((run / "fused" / "task_arithmetic" / "fusion.json").read_text())
    scores = {float(value): score for value, score in record["search"]["scores"].items()}
    chosen = record["rule"]["init_args"]["scaling_coefficient"]
    assert chosen == max(scores, key=scores.__getitem__)
    assert 0.0 < chosen < 1.5  # larger updates have larger errors, and were not followed
    errors = {
        (each["model"], each["task"]): each["value"] for each in json.loads((run / "results.json").read_text())["rows"]
    }
    better = [errors["fused", task] < errors["pretrained", task] for model, task in errors if model == "fused"]
    assert better.count(True) >= 2


def test_a_grid_goes_the_way_of_the_metric(run: Path, tmp_path: Path) -> None:
    recipe = {"output": str(tmp_path / "sweep"), "runs": [str(run)], "rules": ["task_arithmetic"]}
    recipe |= {"protocols": ["strict", "published"], "scaling_coefficients": GRID}
    (tmp_path / "sweep.yaml").write_text(json.dumps(recipe))
    assert main(["sweep", "--config", str(tmp_path / "sweep.yaml")]) == 0
    points = [json.loads(path.read_text()) for path in (tmp_path / "sweep" / "ledger").rglob("*.json")]
    points = [point for point in points if point.get("kind") == "point"]
    found: dict[tuple[str, tuple[str, ...]], dict[float, list[float]]] = {}
    for point in points:
        place = found.setdefault((point["split"], tuple(point["fused_tasks"])), {})
        place[point["rule_config"]["init_args"]["scaling_coefficient"]] = [each["value"] for each in point["values"]]
    rows = json.loads((tmp_path / "sweep" / "results.json").read_text())["rows"]
    for each in rows:
        split = "validation" if each["protocol"] == "strict" else "test"
        of_grid = found[split, tuple(each["fused_tasks"])]
        means = {value: sum(errors) / len(errors) for value, errors in of_grid.items()}
        [chosen] = set(each["scaling_coefficients"].values())
        assert chosen == min(means, key=means.__getitem__)
        assert each["normalized"] is None
        assert each["higher_is_better"] is False
    summary = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["summary"]
    assert {tuple(line["mean"]) for line in summary} == {("abs_sub", "abs_all")}


def test_the_published_criterion_takes_no_share_of_an_error() -> None:
    rows = [row("a", "accuracy", 0.4), row("b", "error", 5.0)]
    assert share_of_all(rows, {"a": 0.8, "b": 1.0}) == 0.5
    low, high = ([row("b", "error", value)] for value in (1.0, 2.0))
    assert share_of_all(low, {"b": 1.0}) > share_of_all(high, {"b": 1.0})


def test_criteria_leave_errors_out_beside_scores() -> None:
    known = Denominators(("a", "b"), {"a": 0.8, "b": 2.0}, None, {"b"})
    found = measure(Score(("a", "b"), (), {"a": 0.4, "b": 5.0}), known)
    assert found == {"abs_sub": 0.4, "abs_all": 0.4, "own_sub": 0.5, "own_all": 0.5}
    assert measure(Score(("b",), (), {"a": 0.4, "b": 5.0}), known) == {"abs_all": 0.4, "own_all": 0.5}
    alone = Denominators(("b", "c"), {"b": 2.0, "c": 1.0}, None, {"b", "c"})
    assert measure(Score(("b",), (), {"b": 5.0, "c": 3.0}), alone) == {"abs_sub": 5.0, "abs_all": 4.0}


def test_the_leading_cell_is_the_lowest_error() -> None:
    rows = [
        row(task, metric, value, rule=rule)
        for rule, values in {"average": (9.5, -0.1, 0.5), "ties": (10.5, -0.2, 0.6)}.items()
        for task, metric, value in zip("abc", ("error", "spearman", "accuracy"), values, strict=True)
    ]
    best = best_cells(normalize(rows))
    assert best == {"a error": "9.500", "b spearman": "-0.100", "c accuracy": "0.600", "mean": "0.200"}
    alone = normalize([each for each in rows if each["metric"] == "error"])
    assert best_cells(alone) == {"a": "9.500"}
