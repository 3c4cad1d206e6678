"""The run folder's states, and what counts as a changed configuration."""

from pathlib import Path

import pytest
import yaml

from fusionlab.errors import InputError
from fusionlab.layout import CONFIG, RESULTS
from fusionlab.runs.folder import RunFolder, changed_keys

CONFIGURATION = {"model": {"init_args": {"rank": 16}}, "trainer": {"max_steps": 10, "devices": 1}, "overwrite": False}


def begun(path: Path) -> RunFolder:
    path.mkdir(parents=True)
    (path / CONFIG).write_text(yaml.safe_dump(CONFIGURATION))
    return RunFolder(path)


def test_next_free_counts_up_and_cleans_the_name(tmp_path: Path) -> None:
    first = RunFolder.next_free("open ai/clip-lora", tmp_path)
    assert first.path == tmp_path / "open-ai-clip-lora-1"
    first.path.mkdir()
    assert RunFolder.next_free("open ai/clip-lora", tmp_path).path.name == "open-ai-clip-lora-2"


def test_new_unfinished_finished(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new").check(CONFIGURATION) == "new"
    folder = begun(tmp_path / "run")
    assert folder.check(CONFIGURATION) == "unfinished"
    (folder.path / RESULTS).write_text("{}")
    with pytest.raises(InputError, match=r"is finished.*--overwrite"):
        folder.check(CONFIGURATION)
    assert folder.check(CONFIGURATION, overwrite=True) == "new"


def test_changed_configuration_names_the_key_and_both_values(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    changed = {**CONFIGURATION, "model": {"init_args": {"rank": 8}}}
    with pytest.raises(InputError, match=r"model.init_args.rank \(16 before, 8 now\)"):
        folder.check(changed)


def test_where_a_run_runs_is_no_change() -> None:
    other = {**CONFIGURATION, "trainer": {"max_steps": 10, "devices": 2, "strategy": "ddp"}, "overwrite": True}
    assert changed_keys(CONFIGURATION, other) == []
    assert changed_keys(CONFIGURATION, {**other, "trainer": {"max_steps": 11, "devices": 2}}) != []
