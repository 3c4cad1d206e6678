"""What earlier versions wrote loads, goes on and takes more tasks; what their ledgers know is not computed again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from often import often
from safetensors.torch import load_file

import fusionlab
from fusionlab.__main__ import main
from fusionlab.evaluation.rows import ROW_FIELDS, read_rows
from fusionlab.reporting import single_task_values
from fusionlab.runs.folder import RunFolder
from fusionlab.runs.loading import Run

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = ("at_3a16601", "at_ac0f7e8")
PATHS = {
    "ClipModule": ("fusionlab.ClipModule", "fusionlab.modules.ClipModule", "fusionlab.modules.clip.ClipModule"),
    "ImageTasks": ("fusionlab.ImageTasks", "fusionlab.data.ImageTasks", "fusionlab.data.images.ImageTasks"),
}


@pytest.fixture(params=VERSIONS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return shutil.copytree(FIXTURES / request.param / "run_clip", tmp_path / "run_clip")


def fit(run: Path, tasks: list[str], paths: int | None = None) -> int:
    """``fit`` by the run's own configuration; the classes by another of their paths where one is asked for."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"]["tasks"] = tasks
    for part in ("model", "data"):
        name = config[part]["class_path"].rpartition(".")[2]
        if paths is not None:
            config[part]["class_path"] = PATHS[name][paths]
    given = run.parent / "given.yaml"
    given.write_text(yaml.safe_dump(config))
    return main(["fit", "--config", str(given), "--trainer.default_root_dir", str(run)])


def adapter(run: Path, task: str) -> dict[str, bytes]:
    """Values by name; their order in the file was another one."""
    state = load_file(run / "adapters" / task / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def values(run: Path) -> dict[tuple[Any, ...], float]:
    rows = json.loads((run / "results.json").read_text())["rows"]
    return {(row["model"], row["rule"], row["task"], row["split"]): row["value"] for row in rows}


def test_a_run_loads(run: Path) -> None:
    loaded = fusionlab.load(run)
    assert isinstance(loaded, Run)
    assert loaded.config["model"]["init_args"]["rank"] == 1
    assert loaded.adapters.keys() == {"digits", "signs"}
    assert "average" in loaded.fused
    assert {row["model"] for row in loaded.rows} == {"pretrained", "finetuned", "fused"}


@pytest.mark.parametrize("paths", often([None, 0, 1, 2], "None"))
def test_an_unfinished_run_goes_on(run: Path, paths: int | None) -> None:
    before, trained = values(run), adapter(run, "signs")
    (run / "results.json").unlink()
    shutil.rmtree(run / "adapters")
    assert fit(run, ["digits", "signs"], paths) == 0
    assert adapter(run, "signs") == trained
    assert values(run) == before


def test_a_run_takes_another_task(run: Path) -> None:
    before, trained = values(run), adapter(run, "digits")
    assert fit(run, ["digits", "signs", "shapes"], 0) == 0
    assert adapter(run, "digits") == trained
    now = values(run)
    assert {key: now[key] for key in before if key[0] == "finetuned"} == {
        key: value for key, value in before.items() if key[0] == "finetuned"
    }
    assert {task for model, _, task, _ in now if model == "fused"} == {"digits", "signs", "shapes"}
    assert set(RunFolder(run).taken()) == {"digits", "signs"}


def test_other_classes_of_one_name_are_other_classes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["class_path"] = "elsewhere.ClipModule"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "results.json").unlink()
    config["model"]["class_path"] = "fusionlab.ClipModule"
    (run.parent / "given.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(run.parent / "given.yaml"), "--trainer.default_root_dir", str(run)]) == 2
    assert "model.class_path ('elsewhere.ClipModule' before, 'fusionlab.ClipModule' now)" in capsys.readouterr().err


def test_a_ledger_s_points_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = FIXTURES / "at_ac0f7e8"
    for name in ("run_clip", "sweep_clip"):
        shutil.copytree(before / name, tmp_path / name)
    shutil.copy(before / "sweep_clip.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fusionlab.commands.sweep.scores.score_candidates", pytest.fail)
    assert main(["sweep", "--config", "sweep_clip.yaml"]) == 0
    rows, expected = (
        [{key: row.get(key) for key in ("rule", "task", "split", "value", "normalized", "protocol", "denominator")}
         for row in json.loads((at / "sweep_clip" / "results.json").read_text())["rows"]]
        for at in (tmp_path, before)
    )  # fmt: skip
    assert rows == expected
    # LoraHub's samples are drawn since, so that its search is another record; its points are those of before
    assert len(list((tmp_path / "sweep_clip" / "ledger" / "points").rglob("*.json"))) == 6 + 1


def test_rows_of_schema_1_are_read_with_what_their_metrics_and_lm_eval_say(tmp_path: Path) -> None:
    before = FIXTURES / "at_088fe0e" / "run_causal"
    assert json.loads((before / "results.json").read_text())["schema"] == 1
    rows = read_rows(before / "results.json")
    assert {tuple(sorted({*row} - {"limited", "lm_eval"})) for row in rows} == {tuple(sorted(ROW_FIELDS))}
    assert {row["metric"]: row["higher_is_better"] for row in rows} == {
        "exact_match": True, "accuracy": True, "near_ties": None, "acc": True, "acc_norm": True, "brier_score": False,
    }  # fmt: skip
    errors = {row["metric"]: row["stderr"] for row in rows}
    assert errors["acc"] == pytest.approx(0.18443, abs=1e-5)
    assert errors["accuracy"] is errors["brier_score"] is None
    assert single_task_values(before) == {
        ("count", "exact_match"): 0.0,
        ("sure", "accuracy"): 0.0,
        ("sure", "near_ties"): 0.0,
    }
    assert main(["report", str(before), "--output", str(tmp_path / "report")]) == 0
    told = (tmp_path / "report" / "report.md").read_text()
    assert "| pretrained | choose | acc | 0.2857 ± 0.1844 | 7 |" in told
    assert "the first 2 of 3 samples" in told
