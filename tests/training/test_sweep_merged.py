"""`scored_tasks: merged`: the numbers of a whole sweep on the fused tasks, and none of the other tasks'."""

import json
import re
from pathlib import Path

import pytest
import yaml

from fusionlab.__main__ import main

TASKS = ["digits", "signs", "textures"]
RECIPE = {
    "fit": {
        "model": {"class_path": "ClipModule", "init_args": {"learning_rate": 0.01}},
        "data": {"class_path": "ImageTasks", "init_args": {"tasks": TASKS, "max_samples": 40, "eval_batch_size": 40}},
        "trainer": {"max_steps": 2, "enable_progress_bar": False},
    },
    "methods": ["lora"],
    "rules": ["average", "task_arithmetic", "ties"],
    "scaling_coefficients": [0.5, 1.0],
}


def sweep(output: Path, **changes: object) -> int:
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**RECIPE, "output": str(output), **changes}))
    return main(["sweep", "--config", str(path)])


@pytest.mark.slow
def test_merged_tasks_alone_are_scored_as_in_a_whole_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path / "all") == 0
    assert sweep(tmp_path / "merged", scored_tasks="merged") == 0
    found = {}
    for name in ("all", "merged"):
        rows = json.loads((tmp_path / name / "results.json").read_text())["rows"]
        found[name] = {(row["rule"], *row["fused_tasks"], row["task"]): row["value"] for row in rows}
    fused = {place: value for place, value in found["all"].items() if place[-1] in place[1:-1]}
    assert len(fused) == 3 * (3 * 2 + 3) < len(found["all"])
    assert found["merged"] == fused

    whole, part = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("all", "merged"))
    for line, of_all in zip(part["summary"], whole["summary"], strict=True):
        assert line["mean"] == {name: of_all["mean"][name] for name in ("abs_sub", "own_sub")}
    assert main(["report", str(tmp_path / "merged"), "--output", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Over the fused tasks" in page
    assert "All 3 tasks fused, by task" in page
    assert "Over all tasks" not in page

    # one ledger for both: each recipe counts its own points
    assert sweep(tmp_path / "merged") == 0
    rows = json.loads((tmp_path / "merged" / "results.json").read_text())["rows"]
    assert {(row["rule"], *row["fused_tasks"], row["task"]): row["value"] for row in rows} == found["all"]

    capsys.readouterr()
    counted = []
    for name in ("all", "merged"):
        assert sweep(tmp_path / name, scored_tasks=name, dry_run=True) == 0
        told = capsys.readouterr().out.replace(",", "")
        counted.append([int(re.search(words, told).group(1)) for words in (r"(\d+) of test", r"floor: .*= \((\d+) ")])
    # 36 points (3 rules, 4 subsets) and the fine-tuned models themselves, of 40 samples
    assert counted[0] == [40 * (3 * 4 * 3 + 3)] * 2
    assert counted[1] == [40 * (3 * 9 + 3)] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scored_tasks": "merged", "protocols": ["strict", "published"]}, "which chooses by the scores of all tasks"),
        ({"scored_tasks": "fused"}, "scored_tasks"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "refused", **changes) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
