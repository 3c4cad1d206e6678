"""Modules and data of other packages, scored as they say, or refused before anything is trained."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import own_regressor
import own_scorers
import pytest
import torch
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import fusionlab
from fusionlab import reporting
from fusionlab.__main__ import main
from fusionlab.contracts import primary_metric
from fusionlab.errors import InputError
from fusionlab.evaluation import primary
from fusionlab.evaluation.metrics import ScoreCorrelation
from fusionlab.evaluation.rows import primary_rows, rows_of
from fusionlab.keys import scoring_key
from fusionlab.reporting.results import best_cells
from fusionlab.reporting.scores import groups

Rows = list[dict[str, Any]]
PLANES = "own_regressor.Planes"
SIXTEEN = ["--data.eval_batch_size", "16"]
SPLIT = own_regressor.Planes().splits["plane 0"]["test"]


def command(name: str, model: str, *flags: str, data: str = PLANES) -> list[str]:
    given = [name, "--model", model if "." in model else f"own_scorers.{model}", "--data", data, *flags]
    return [*given, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


def fit(folder: Path, model: str, rule: str, *flags: str, data: str = PLANES, steps: int = 3) -> int:
    flags = ("--fusion.rules", f"[{rule}]", "--trainer.max_steps", str(steps), *flags)
    return main(command("fit", model, *flags, "--trainer.default_root_dir", str(folder), data=data))


def rows_in(path: Path) -> Rows:
    return json.loads(path.read_text())["rows"]


def sweep(folder: Path, model: str, rule: str, **more: Any) -> int:
    fitted = {"model": {"class_path": model}, "data": {"class_path": PLANES}, "trainer": {"max_steps": 3}}
    recipe = {"output": str(folder), "fit": fitted, "methods": ["full"], "rules": [rule], "sizes": [2], "processes": 1}
    folder.with_suffix(".yaml").write_text(json.dumps(recipe | more))
    return main(["sweep", "--config", str(folder.with_suffix(".yaml"))])


# the metric that choices are made by


def test_choices_are_made_by_the_metric_that_the_module_says(tmp_path: Path) -> None:
    chosen = {}
    for model in ("Said", "own_regressor.Regressor"):
        assert fit(tmp_path / model, model, "task_arithmetic", steps=20) == 0
        rows = primary_rows(rows_in(tmp_path / model / "results.json"))
        assert {row["metric"] for row in rows} == {"squared_error"}
        chosen[model] = next(row["scaling_coefficients"] for row in rows if row["model"] == "fused")
    assert chosen["Said"] == chosen["own_regressor.Regressor"]


def first(module: Any) -> str:
    return fusionlab.evaluate(module, own_regressor.Planes(), ["plane 0"])[0]["metric"]


def test_a_sorted_mapping_is_told_once_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    primary._tell.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [first(own_scorers.Several()), first(own_scorers.Several())] == ["a_bias", "a_bias"]
        assert len(caplog.records) == 1
        assert "made by a_bias, the first metric of Several (a_bias, squared_error)" in caplog.text
        assert "give it a list, or let Several.primary_metric(task) give its name" in caplog.text
        found = [first(own_scorers.Said()), first(own_scorers.Listed()), first(own_regressor.Regressor())]
        assert found == ["squared_error", "MeanAbsoluteError", "squared_error"]
    assert len(caplog.records) == 1


def test_the_metric_that_is_said_is_one_of_the_metrics_and_in_the_key() -> None:
    with pytest.raises(InputError, match="primary_metric is 'squared_eror'; did you mean 'squared_error'"):
        first(own_scorers.Misnamed())
    module, data = own_scorers.Said(), own_regressor.Planes()
    others = [own_scorers.Several(), own_scorers.Misnamed()]
    assert len({scoring_key(each, data, "plane 0", "test") for each in (module, *others)}) == 3
    plain: Any = SimpleNamespace()  # no such member is asked of modules
    assert primary_metric(plain, "plane 0") is None


# what rows are called, and what a metric may give


def correlations(**options: Any) -> MetricCollection:
    metrics = MetricCollection({"c": ScoreCorrelation(), "d": ScoreCorrelation("pearson")}, **options)
    return counted(metrics)


def counted(metrics: MetricCollection) -> MetricCollection:
    found = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.5, 4.0, 1.0]), torch.arange(3)
    metrics.update(*found, torch.ones(3).bool(), torch.tensor([False, False, True]))
    return metrics


ONE = ["spearman", "pearson", "unparsable"]
TWO = [f"c_{name}" for name in ONE] + ["d_pearson", "d_spearman", "d_unparsable"]
FLATTENED = {
    "alone": (counted(MetricCollection({"c": ScoreCorrelation()})), ONE),
    "prefix": (counted(MetricCollection({"c": ScoreCorrelation()}, prefix="val/")), [f"val/{name}" for name in ONE]),
    "two": (correlations(), TWO),
    "two and postfix": (correlations(postfix="-x"), [f"{name}-x" for name in TWO]),
}


@pytest.mark.parametrize("case", FLATTENED)
def test_rows_have_the_names_that_torchmetrics_gives(case: str) -> None:
    metrics, names = FLATTENED[case]
    rows = rows_of("a", "test", metrics, SPLIT, {})
    assert [row["metric"] for row in rows] == names == list(metrics.compute())
    counts = {row["metric"] for row in rows if row["higher_is_better"] is None}
    assert counts == {name for name in names if "unparsable" in name}


def test_a_value_that_is_no_single_number_is_refused_by_name() -> None:
    metrics = MetricCollection({"acc": MulticlassAccuracy(3, average="none")})
    metrics.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
    with pytest.raises(InputError, match=r"'a', test: expected one number of each metric, and acc has shape \(3,\)"):
        rows_of("a", "test", metrics, SPLIT, {})


def test_a_value_of_unknown_direction_is_a_plain_number() -> None:
    metrics = MetricCollection({"mse": MeanSquaredError(), "loss": MeanMetric()})
    metrics["mse"].update(torch.tensor([1.0]), torch.tensor([0.0]))
    metrics["loss"].update(torch.tensor(0.6))
    rows = rows_of("t", "test", metrics, SPLIT, {"model": "fused", "rule": "average"}, "mse")
    assert [(row["metric"], row["higher_is_better"]) for row in rows] == [("mse", False), ("loss", None)]
    told = reporting.markdown(rows, "x")
    assert "answers" not in told
    assert "| t mse | t loss |" in told
    assert "| 1.000 | 0.600 |" in told
    assert best_cells(rows) == {"t mse": "1.000"}
    assert [(group.higher, group.axis.label) for group in groups(rows)] == [
        (False, "mse (lower is better)"),
        (None, "loss"),
    ]


# what a run's options say


def test_rows_tell_the_seed_of_everything(tmp_path: Path) -> None:
    assert fit(tmp_path / "run", "own_regressor.Regressor", "average", "--seed_everything", "7") == 0
    assert {row["seed"] for row in rows_in(tmp_path / "run/results.json")} == {7}
    assert sweep(tmp_path / "sweep", "own_regressor.Regressor", "average", seeds=[1, 2]) == 0
    for seed in (1, 2):
        assert {row["seed"] for row in rows_in(tmp_path / f"sweep/runs/full-seed{seed}/results.json")} == {seed}
    own = own_regressor.Regressor()
    own.seed = 3
    assert own.seed == 3


def test_rows_tell_the_precision_in_which_they_are_scored(tmp_path: Path) -> None:
    rows = {}
    for precision in ("32-true", "bf16-mixed"):
        flags = ["--trainer.precision", precision, "--output", str(tmp_path / f"{precision}.json")]
        assert main(command("test", "own_regressor.Regressor", *flags)) == 0
        rows[precision] = rows_in(tmp_path / f"{precision}.json")
        assert {row["precision"] for row in rows[precision]} == {precision}
    values = [[row["value"] for row in rows[precision]] for precision in rows]
    assert values[0] != values[1]
    assert values[0] == pytest.approx(values[1], rel=0.05)
    flags = ["--trainer.precision", "bf16-mixed"]
    assert fit(tmp_path / "run", "own_regressor.Regressor", "average", *flags) == 0  # which scores after its steps
    in_fit = [row for row in rows_in(tmp_path / "run/results.json") if row["model"] == "pretrained"]
    assert [(row["value"], row["precision"]) for row in in_fit] == [(value, "bf16-mixed") for value in values[1]]
    module, data = own_regressor.Regressor(), own_regressor.Planes()
    before = scoring_key(module, data, "plane 0", "test")
    module.precision = "bf16-mixed"
    assert scoring_key(module, data, "plane 0", "test") != before


def test_a_bound_cuts_any_data(tmp_path: Path) -> None:
    limits = ["--trainer.limit_test_batches", "1", "--trainer.limit_val_batches", "2", *SIXTEEN]
    assert fit(tmp_path / "run", "own_regressor.Regressor", "task_arithmetic", *limits) == 0
    rows = rows_in(tmp_path / "run/results.json")
    assert {row["num_samples"] for row in rows} == {16}
    assert all(row["limited"].startswith("limit_test_batches 1: the first 16 of 40 samples") for row in rows)
    chosen = [row for row in rows if "chosen on a part of validation" in row["limited"]]
    assert {row["rule"] for row in chosen} == {"task_arithmetic"}
    options = {"validate": ("validation", "limit_val_batches"), "test": ("test", "limit_test_batches")}
    for name, (split, option) in options.items():
        flags = [*SIXTEEN, f"--trainer.{option}", "1", "--output", str(tmp_path / "rows.json")]
        assert main(command(name, "own_regressor.Regressor", *flags)) == 0
        found = {(row["split"], row["num_samples"]) for row in rows_in(tmp_path / "rows.json")}
        assert found == {(split, 16)}


def test_a_bound_is_refused_where_data_make_their_batches_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = "own_scorers.OwnBatches", "own_regressor.Regressor"
    assert fit(tmp_path / "run", model, "average", "--trainer.limit_test_batches", "1", *SIXTEEN, data=data) == 2
    told = "trainer.limit_test_batches 1: OwnBatches makes its evaluation batches itself"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert fit(tmp_path / "whole", model, "average", data=data) == 0
    assert fit(tmp_path / "tried", model, "average", "--trainer.fast_dev_run", "true", data=data) == 0


def test_weights_act_in_the_dtype_of_the_base(tmp_path: Path) -> None:
    assert fit(tmp_path / "run", "Narrow", "average", steps=30) == 0
    rows = rows_in(tmp_path / "run/results.json")
    errors = {(row["model"], row["task"]): row["value"] for row in rows}
    assert all(errors["fused", task] != errors["pretrained", task] for _, task in errors)


# refused, and when


REFUSED = {
    "own_regressor.Regressor": ("adamerging", "needs the probabilities of classes, and Regressor scores no classes"),
    "own_scorers.Undirected": ("task_arithmetic", "rules task_arithmetic: nothing to choose by: loss of plane 0"),
}


@pytest.mark.parametrize("model", REFUSED)
def test_what_a_module_cannot_be_chosen_by_is_refused_before_training(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, told = REFUSED[model]

    def trained(*_: Any) -> None:
        raise AssertionError("trained before it was refused")

    monkeypatch.setattr(own_regressor.Regressor, "training_step", trained)
    assert fit(tmp_path / "run", model, rule) == 2
    assert told in capsys.readouterr().err
    assert fit(tmp_path / "run", model, rule, "--dry_run", "true") == 2
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    assert sweep(tmp_path / "sweep", model, rule) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_rule_that_does_not_choose_goes_with_any_metric(tmp_path: Path) -> None:
    assert fit(tmp_path / "run", "Undirected", "average") == 0
    assert {row["metric"] for row in rows_in(tmp_path / "run/results.json")} == {"loss"}
    assert "| fused: average |" in (tmp_path / "run/results.md").read_text()


@pytest.mark.parametrize("name", ["validate", "test"])
def test_a_module_without_rows_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(name, "Silent", "--output", str(tmp_path / "rows.json"))) == 2
    assert f"{name} scored nothing: Silent.rows is empty" in capsys.readouterr().err
    assert not (tmp_path / "rows.json").exists()
