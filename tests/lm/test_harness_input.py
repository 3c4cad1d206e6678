"""Tasks of lm-eval that cannot be read: one message with the task's name, before anything is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fusionlab.__main__ import main
from fusionlab.errors import InputError

pytest.importorskip("lm_eval")
from fusionlab.harness import HarnessTasks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of lm-eval's own libraries


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    rows = [{"q": f"film {i}:", "choices": ["yes", "no"], "gold": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"test": str(tmp_path / "rows.jsonl")}
    return {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
    }  # fmt: skip


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such column": ({"doc_to_text": "{{nope}}"}, "UndefinedError: 'nope' is undefined"),
    "no such key": ({"foo": 1}, "unexpected keyword argument 'foo'"),
    "no Jinja": ({"doc_to_text": "{{q"}, "TemplateSyntaxError: unexpected end of template"),
    "no such metric": ({"metric_list": [{"metric": "nope"}]}, "nope not found in the evaluate library"),
    "no such output": ({"output_type": "multi"}, "Got invalid output_type 'multi'"),
    "no such split": ({"test_split": "val"}, "KeyError: 'val'"),
    "no such filter": ({"filter_list": [{"name": "x", "filter": [{"function": "nope"}]}]}, "Unknown filter 'nope'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_lm_eval_cannot_make_is_told_by_name(task: dict[str, Any], case: str) -> None:
    more, told = WRONG[case]
    with pytest.raises(InputError, match=rf"^harness: wrong cannot be read: .*{re.escape(told)}"):
        HarnessTasks.load([task, task | more | {"task": "wrong"}])


FILES = {"a sentence": "task: x\n  - [oops\n", "no YAML": "task: [x\n", "a list": "- a\n- b\n"}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_tasks_are_told_by_name(tmp_path: Path, case: str) -> None:
    (tmp_path / "bad.yaml").write_text(FILES[case])
    with pytest.raises(InputError, match=r"^harness: bad\.yaml cannot be read: "):
        HarnessTasks.load([str(tmp_path / "bad.yaml")])


def test_one_name_is_one_task(task: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="harness: mine is given twice"):
        HarnessTasks.load([task, task | {"num_fewshot": 3}])
    assert list(HarnessTasks.load([task, task | {"task": "other"}]).tasks) == ["mine", "other"]


def test_a_task_that_keeps_its_examples_is_said(task: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    two = [task | {"num_fewshot": 0}, task | {"task": "other", "num_fewshot": 1, "fewshot_split": "test"}]
    loaded = HarnessTasks.load(two, num_fewshot=2)
    assert [each.get_config("num_fewshot") for each in loaded.tasks.values()] == [0, 2]
    assert "harness_num_fewshot 2 does nothing for mine, which says 0 itself" in caplog.text


def test_it_is_refused_before_training(
    task: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = json.dumps([task | {"doc_to_text": "{{q"}])
    argv = ["fit", "--model", "CausalModule", "--data", "ChatTasks", "--harness", asked]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
    assert "harness: mine cannot be read: TemplateSyntaxError" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
