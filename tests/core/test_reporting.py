"""Tables, denominators and files made from result rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from fusionlab import reporting
from fusionlab.errors import InputError
from fusionlab.evaluation.rows import ROW_FIELDS


def row(**fields: Any) -> dict[str, Any]:
    known = {"metric": "accuracy", "split": "test", "num_samples": 10, "data_version": "v", "seed": 1, "method": "lora"}
    return dict.fromkeys(ROW_FIELDS) | {"higher_is_better": True} | known | fields


ROWS = [
    row(model="pretrained", task="a", value=0.2),
    row(model="pretrained", task="b", value=0.4),
    row(model="finetuned", task="a", finetuned_on="a", value=0.8),
    row(model="finetuned", task="b", finetuned_on="a", value=0.1),
    row(model="finetuned", task="b", finetuned_on="b", value=0.0),
    row(model="fused", rule="metagpt", task="a", value=0.6, scaling_coefficients={"a": 0.5, "b": 0.5}),
    row(model="fused", rule="metagpt", task="b", value=0.5, scaling_coefficients={"a": 0.5, "b": 0.5}),
]


def test_normalize_by_own_single_task_value() -> None:
    rows = reporting.normalize(ROWS)
    assert [r["normalized"] for r in rows if r["task"] == "a"] == pytest.approx([0.25, 1.0, 0.75])
    assert [r["normalized"] for r in rows if r["task"] == "b"] == [None] * 4  # the denominator is zero
    assert {r["denominator"] for r in rows} == {"own"}


def test_full_reference_adds_rows_of_its_own() -> None:
    rows = reporting.normalize(ROWS, {("a", "accuracy"): 0.5})
    assert len(rows) == 2 * len(ROWS)
    full = [r for r in rows if r["denominator"] == "full" and r["task"] == "a"]
    assert [r["normalized"] for r in full] == pytest.approx([0.4, 1.6, 1.2])


def test_table_has_one_line_per_model_and_own_tasks_only() -> None:
    header, body = reporting.table(reporting.normalize(ROWS, {("a", "accuracy"): 0.5}))
    assert header == ["model", "a", "b", "mean"]
    assert body == [
        ["pretrained", "0.200", "0.400", "0.300"],
        ["finetuned", "0.800", "0.000", "0.400"],
        ["fused: metagpt", "0.600", "0.500", "0.550"],
    ]


def test_files_are_written_and_read_back(tmp_path: Path) -> None:
    rows = reporting.normalize(ROWS)
    reporting.write_results(tmp_path / "results.json", rows)
    assert json.loads((tmp_path / "results.json").read_text()) == {"schema": 2, "rows": rows}
    assert reporting.single_task_values(tmp_path) == {("a", "accuracy"): 0.8, ("b", "accuracy"): 0.0}
    assert "| fused: metagpt | 0.600 |" in reporting.markdown(rows, "title")
    reporting.plot_scores(rows, tmp_path / "plots" / "scores.png")
    assert (tmp_path / "plots" / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plots", "results.json"]


def test_reference_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no results.json"):
        reporting.single_task_values(tmp_path)
