"""Modules and data of another package in the ways that Lightning's users write them."""

from __future__ import annotations

import json
from pathlib import Path

import own_kinds
import own_regressor
import pytest
import torch

import fusionlab
from fusionlab.__main__ import main
from fusionlab.backbones import own_folder
from fusionlab.contracts import as_data, as_module
from fusionlab.errors import InputError
from fusionlab.search.workbench import workbench


def fit(folder: Path, module: str = "own_regressor.Regressor", data: str = "own_regressor.Planes") -> list[str]:
    given = ["fit", "--model", module, "--data", data, "--trainer.default_root_dir", str(folder)]
    return [*given, "--trainer.max_steps", "3", "--fusion.rules", "[average]"]


# what a run of them is


def test_a_run_of_own_data_is_loaded(tmp_path: Path) -> None:
    assert main(fit(tmp_path / "run")) == 0
    run = fusionlab.load(tmp_path / "run")
    assert list(run.finetuned) == ["plane 0", "plane 1", "plane 2"]
    assert list(run.fused) == ["average"]
    assert run.config["data"]["class_path"] == "own_regressor.Planes"
    assert {row["rule"] for row in run.rows} == {None, "average"}


def test_a_name_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("regressor").mkdir()
    Path("regressor/private_notes.txt").write_text("x")
    Path("regressor/config.yaml").write_text("x: 1")
    assert main(fit(tmp_path / "run")) == 0
    for folder in ("finetuned/plane 0", "fused/average"):
        assert not {"private_notes.txt", "config.yaml"} & {path.name for path in (tmp_path / "run" / folder).iterdir()}
    assert fusionlab.load(tmp_path / "run/fused/average").labels["rule"] == "average"


def test_a_backbone_says_what_it_was_loaded_from() -> None:
    loaded = fusionlab.load_backbone("tiny-clip")
    assert own_folder(loaded) == Path(fusionlab.__file__).parent / "assets/tiny-clip"
    made = type(loaded)(loaded.model, loaded.tokenizer, name="tiny-clip")
    assert own_folder(made) is None


def test_a_model_with_a_config_yaml_of_its_base_is_no_run(tmp_path: Path) -> None:
    assert main(fit(tmp_path / "run")) == 0
    folder = tmp_path / "run/fused/average"
    (folder / "config.yaml").write_text("x: 1")
    assert fusionlab.load(folder).labels["rule"] == "average"


# what fit takes


@pytest.mark.parametrize(
    ("module", "data"),
    [
        ("own_regressor.Regressor", "own_kinds.InSetup"),
        ("own_kinds.OfTrainer", "own_regressor.Planes"),
        ("own_kinds.Unused", "own_regressor.Planes"),
        ("own_kinds.Tied", "own_regressor.Planes"),
    ],
)
def test_dry_run_and_fit_take_the_same(
    module: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = fit(tmp_path / "run", module, data)
    assert main([*given, "--dry_run"]) == 0, capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(given) == 0, capsys.readouterr().err
    assert set(fusionlab.load(tmp_path / "run").fused) == {"average"}


def test_a_bench_sets_data_up_once() -> None:
    bench = workbench({"model": {"class_path": "own_regressor.Regressor"}, "data": {"class_path": "own_kinds.InSetup"}})
    assert list(bench.data.tasks) == ["plane 0", "plane 1", "plane 2"]


def test_members_are_looked_up_and_not_computed() -> None:
    assert isinstance(as_module(own_kinds.OfTrainer()), own_regressor.Regressor)
    data = own_kinds.InSetup()
    assert as_data(data, is_set_up=False) is data
    with pytest.raises(InputError, match="InSetup lacks members tasks, splits"):
        as_data(data)
    with pytest.raises(InputError, match=r"InSetup makes its tasks in setup, .* give it task_names"):
        _ = data.task_names


class Handing:
    """Hands on what another object has."""

    def __init__(self, inner: object) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def test_what_is_handed_on_counts() -> None:
    data = Handing(own_regressor.Planes())
    assert as_data(data) is data


# names of tasks


@pytest.mark.parametrize("name", ["gsm/8k", "a\\b", ".hidden", "..", "", "zero\0byte", "Plane 1", "ends\n"])
def test_a_task_that_can_be_no_folder_is_refused_before_training(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"^task name "):
        as_data(own_kinds.Named(name))
    if "\0" in name or not name:
        return
    given = [*fit(tmp_path / "run", data="own_kinds.Named"), f"--data.name={json.dumps(name)}"]
    assert main(given) == 2
    assert "task name " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_names_that_are_no_text_are_refused() -> None:
    data = own_regressor.Planes()
    data.tasks = {3: torch.ones(1)}
    with pytest.raises(InputError, match="task name 3 must"):
        as_data(data)
