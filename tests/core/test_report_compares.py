"""Two runs compared in a report: what is paired, the standard error, and when a difference is called one."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from fusionlab.__main__ import main
from fusionlab.evaluation.rows import ROW_FIELDS
from fusionlab.reporting.pairing import Compared, paired

BASE = {"a": 0.50, "b": 0.60, "c": 0.70, "d": 0.80}


def rows(changes: dict[str, float], *, seeds: tuple[int, ...] = (1,), **fields: Any) -> list[dict[str, Any]]:
    """Rows of a fused model of four tasks, with what is added to each task's score."""
    known = {"model": "fused", "rule": "metagpt", "method": "lora", "metric": "accuracy", "split": "test"}
    known |= {"num_samples": 100, "data_version": "v", "denominator": "own", "higher_is_better": True, "stderr": 0.04}
    known |= {"task_known": False, "fused_tasks": list(BASE)} | fields
    return [
        dict.fromkeys(ROW_FIELDS) | known | {"task": task, "value": BASE[task] + change, "seed": seed}
        for seed in seeds
        for task, change in changes.items()
    ]


NO_CHANGE = dict.fromkeys(BASE, 0.0)


def only(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> Compared:
    (compared,) = paired(first, second).compared
    return compared


def test_a_difference_beyond_twice_the_paired_error_is_better_and_the_other_way_worse() -> None:
    changes = {"a": 0.04, "b": 0.05, "c": 0.06, "d": 0.05}
    found = only(rows(NO_CHANGE), rows(changes))
    assert found.difference == pytest.approx(0.05)
    assert found.error() == pytest.approx(statistics.stdev(changes.values()) / 2)
    assert (found.verdict(), found.counts()) == ("better", (4, 1, 1))
    assert only(rows(changes), rows(NO_CHANGE)).verdict() == "worse"


def test_a_difference_within_twice_the_error_is_not_shown() -> None:
    found = only(rows(NO_CHANGE), rows({"a": 0.2, "b": -0.1, "c": 0.1, "d": 0.0}))
    assert found.difference == pytest.approx(0.05)
    assert found.verdict() == "not shown"


def test_few_pairs_show_nothing() -> None:
    pairs = {"a": 0.05, "b": 0.05}
    assert only(rows(dict.fromkeys(pairs, 0.0)), rows(pairs)).verdict() == "not shown: 2 pairs"
    assert only(rows({"a": 0.0}), rows({"a": 0.05})).verdict() == "not shown: 1 pair"
    assert only(rows(NO_CHANGE), rows(NO_CHANGE)).verdict() == "the same scores"


def test_an_error_is_better_where_it_is_lower() -> None:
    lower = {"metric": "perplexity", "higher_is_better": False}
    changes = {"a": -0.04, "b": -0.05, "c": -0.06, "d": -0.05}
    assert only(rows(NO_CHANGE, **lower), rows(changes, **lower)).verdict() == "better"


def test_the_largest_of_the_three_errors_counts() -> None:
    """Seeds agree and tasks do not: twelve pairs are no twelve independent ones."""
    changes = {"a": 0.16, "b": -0.02, "c": 0.10, "d": -0.04}
    found = only(rows(NO_CHANGE, seeds=(1, 2, 3)), rows(changes, seeds=(1, 2, 3)))
    assert len(found.pairs) == 12
    assert found.error() == pytest.approx(statistics.stdev(changes.values()) / 2)
    over_all = statistics.stdev([*changes.values()] * 3) / 12**0.5
    assert over_all < found.error()
    assert found.verdict() == "not shown"


def test_other_samples_are_not_paired_and_said() -> None:
    second = [each | {"data_version": "w"} if each["task"] == "a" else each for each in rows(NO_CHANGE)]
    found = paired(rows(NO_CHANGE), second)
    assert found.compared[0].counts()[0] == 3
    assert "a: scored on other samples" in found.told[0]


def test_seeds_and_methods_without_a_match() -> None:
    found = paired(rows(NO_CHANGE), rows(NO_CHANGE, seeds=(2,), method="l_lora"))
    assert len(found.compared[0].pairs) == 4
    assert "The first has seed 1, the second 2: compared with one another." in found.told
    found = paired(rows(NO_CHANGE, seeds=(1, 2)), rows(NO_CHANGE, seeds=(3, 4)))
    assert not found.compared
    assert found.told == ["No seed is in both (1, 2 and 3, 4): nothing is paired."]


def test_only_fused_tasks_are_paired_and_models_that_are_told_the_task_apart() -> None:
    first = rows(NO_CHANGE, fused_tasks=["a", "b", "c"])
    assert only(first, first).counts()[0] == 3
    assert paired(first, rows(NO_CHANGE, fused_tasks=["a", "b", "c"], task_known=True)).compared == []


def test_the_command_writes_the_comparison_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, changes in (("one", NO_CHANGE), ("two", {"a": 0.04, "b": 0.05, "c": 0.06, "d": 0.05})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"schema": 2, "rows": rows(changes)}))
    runs = [str(tmp_path / name) for name in ("one", "two")]
    assert main(["report", *runs, "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index("## Comparison") < text.index("## Run one")
    assert "| LoRA, MetaGPT | 4 | 0.650 | 0.700 | +0.050 ± 0.004 | better | 4 | 4 tasks, 1 subset, 1 seed |" in text
    assert main(["report", runs[0], runs[0], "--output", str(tmp_path / "again")]) == 2
    assert "is given twice; give each run once" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"rows": [', "results.json"),
        ('{"results": {"arc_easy": {"acc": 0.5}}}', "has no rows with metric, value"),
    ],
)
def test_results_that_are_none_are_refused(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(content)
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_the_run_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps({"schema": 2, "rows": rows(NO_CHANGE)}))
    (tmp_path / "file").write_text("mine")
    for output, expected in (("run", "that is one of the runs"), ("file", "cannot be written")):
        assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / output)]) == 2
        assert expected in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["results.json"]
    assert (tmp_path / "file").read_text() == "mine"
