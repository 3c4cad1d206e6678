"""Rows of tasks with several metrics: the first one counts in means and choices, faults only in the report."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from fusionlab.errors import InputError
from fusionlab.evaluation.metrics import Accuracy, RankedAccuracy, ScoreCorrelation
from fusionlab.evaluation.rows import ROW_FIELDS, mean_score, primary_rows, read_rows, rows_of
from fusionlab.reporting import markdown, normalize, table


def row(task, metric, value, model="pretrained", **fields):
    known = {
        "task": task,
        "metric": metric,
        "value": value,
        "model": model,
        "split": "test",
        "num_samples": 40,
        "higher_is_better": None if metric == "unparsable" else True,
        **fields,
    }
    return {field: known.get(field) for field in ROW_FIELDS}


ROWS = normalize([
    row("stsb", "spearman", 0.2), row("stsb", "pearson", 0.9), row("stsb", "unparsable", 31.0),
    row("cola", "accuracy", 0.6),
    row("stsb", "spearman", 0.8, "finetuned", finetuned_on="stsb"),
    row("stsb", "pearson", 0.7, "finetuned", finetuned_on="stsb"),
    row("stsb", "unparsable", 2.0, "finetuned", finetuned_on="stsb"),
    row("cola", "accuracy", 0.7, "finetuned", finetuned_on="cola"),
])  # fmt: skip


def test_the_first_metric_of_a_task_is_its_own():
    assert {(row["task"], row["metric"]) for row in primary_rows(ROWS)} == {("stsb", "spearman"), ("cola", "accuracy")}


def test_the_mean_is_over_tasks():
    header, body = table(ROWS)
    assert header == ["model", "stsb spearman", "stsb pearson", "cola accuracy", "mean"]
    assert body[0] == ["pretrained", "0.200", "0.900", "0.600", "0.400"]
    assert body[1] == ["finetuned", "0.800", "0.700", "0.700", "0.750"]


def test_a_count_has_no_share_and_is_told_in_words():
    assert {row["normalized"] for row in ROWS if row["metric"] == "unparsable"} == {None}
    assert next(row["normalized"] for row in ROWS if row["metric"] == "spearman") == 0.25
    assert "- stsb, pretrained: 31 of 40 answers unparsable\n" in markdown(ROWS, "title")


@pytest.mark.parametrize("rows", [ROWS, [{k: v for k, v in row.items() if k != "higher_is_better"} for row in ROWS]])
def test_rows_of_schema_1_say_by_their_metric_what_is_better(tmp_path: Path, rows: list[dict]) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"schema": 1, "rows": rows}))
    assert read_rows(tmp_path / "results.json") == ROWS


def test_lm_evals_rows_of_schema_1_kept_their_error_among_its_own(tmp_path: Path) -> None:
    old = {"metric": "brier", "value": 0.5, "lm_eval": {"filter": "none", "stderr": 0.25, "higher_is_better": False}}
    (tmp_path / "results.json").write_text(json.dumps({"schema": 1, "rows": [old]}))
    [read] = read_rows(tmp_path / "results.json")
    assert (read["stderr"], read["higher_is_better"], read["task_known"]) == (0.25, False, None)


class FourSamples:
    """A split, as far as rows go."""

    data_version = "v"

    def __len__(self) -> int:
        return 4


class Errors(Metric):
    """A metric of another package: the mean of what it is given, better where lower."""

    higher_is_better = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: float) -> None:
        self.total += value

    def compute(self) -> Tensor:
        return self.total


def test_a_metric_says_what_it_is() -> None:
    accuracy, answers, scores, error = Accuracy(), RankedAccuracy("accuracy per token"), ScoreCorrelation(), Errors()
    accuracy.update(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 0]), torch.ones(4).bool())
    answers.update_scores(torch.tensor([[1.0, 2.0]]), torch.tensor([1]), torch.ones(1).bool())
    scores.update(torch.arange(3.0), torch.arange(3.0), torch.arange(3), torch.ones(3).bool(), torch.zeros(3).bool())
    error.update(2.0)
    samples, names = FourSamples(), {error: "error"}
    found = {
        row["metric"]: (row["value"], row["higher_is_better"], row["stderr"])
        for metric in (accuracy, answers, scores, error)
        for row in rows_of("a", "test", MetricCollection({names.get(metric, "accuracy"): metric}), samples, {})
    }
    assert found == {
        "accuracy": (0.75, True, pytest.approx((0.75 * 0.25 / 4) ** 0.5)),
        "accuracy per token": (1.0, True, 0.0),
        "near_ties": (0.0, None, None),
        "spearman": (1.0, True, None),
        "pearson": (1.0, True, None),
        "unparsable": (0.0, None, None),
        "error": (2.0, False, None),
    }


def test_choices_go_the_way_of_the_metric() -> None:
    def errors(*values: float) -> list[dict]:
        return [row(str(task), "error", value, higher_is_better=False) for task, value in enumerate(values)]

    assert mean_score(errors(0.5, 2.0)) > mean_score(errors(0.6, 2.0)) > mean_score(errors(6.0, 2.0))
    assert mean_score(errors(-0.5, 0.0)) > mean_score(errors(0.0, 0.0))  # a log-likelihood of a density
    halves = [row("a", "perplexity", value, higher_is_better=False) for value in (4.0, 1.0)]
    assert mean_score(halves) == pytest.approx(-math.log(2.0))
    with pytest.raises(InputError, match="nothing to choose by: odd of a says neither"):
        mean_score([row("a", "odd", 0.5, higher_is_better=None)])
    mixed = [row("a", "accuracy", 0.5), row("b", "error", 100.0, higher_is_better=False)]
    assert mean_score(mixed) == 0.5


def test_errors_have_no_share_and_no_place_in_a_mean() -> None:
    rows = normalize([
        row("a", "error", 4.0, higher_is_better=False), row("b", "accuracy", 0.5),
        row("a", "error", 2.0, "finetuned", finetuned_on="a", higher_is_better=False),
        row("b", "accuracy", 0.8, "finetuned", finetuned_on="b"),
    ])  # fmt: skip
    assert {r["task"]: r["normalized"] for r in rows if r["model"] == "pretrained"} == {"a": None, "b": 0.625}
    header, body = table(rows)
    assert header == ["model", "a error", "b accuracy", "mean"]
    assert body == [["pretrained", "4.000", "0.500", "0.500"], ["finetuned", "2.000", "0.800", "0.800"]]
