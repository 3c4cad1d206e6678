"""Rows of tasks with several metrics: the first one counts in means and choices, faults only in the report."""

from fusionlab.evaluation.scores import ROW_FIELDS, primary_rows
from fusionlab.reporting import markdown, normalize, table


def row(task, metric, value, model="pretrained", **fields):
    known = {
        "task": task,
        "metric": metric,
        "value": value,
        "model": model,
        "split": "test",
        "num_samples": 40,
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
