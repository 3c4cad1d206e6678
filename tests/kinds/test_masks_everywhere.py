"""EMR and TALL in ``fit``, ``fuse``, ``sweep``, ``test``, ``predict`` and Python: each task under its own weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fusionlab
from fusionlab.__main__ import main
from fusionlab.commands.push import files_to_push
from fusionlab.fusion.making import fuse_weights
from fusionlab.layout import MASKS, UNIFIED
from fusionlab.reporting.results import best_cells, table, task_known_table
from fusionlab.tensors.masked import MaskedVectors

TASKS = ["digits", "signs"]
SMALL = ["--data.max_samples", "16", "--data.eval_batch_size", "16", "--data.batch_size", "4"]
RULES: dict[str, Any] = {
    "average": "average",
    "emr": "emr",
    "tall": "tall",
    "tall_given": {"class_path": "tall", "init_args": {"mask_threshold": {"digits": 0.2, "signs": 0.6}}},
}
METHODS = ["lora", *(pytest.param(each, marks=pytest.mark.slow) for each in ("l_lora", "full", "tangent_lora"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, fitted = tmp_path_factory.mktemp("runs"), {}

    def folder(method: str) -> Path:
        if method not in fitted:
            argv = ["fit", "--model.method", method, "--data.tasks", json.dumps(TASKS), *SMALL]
            argv += ["--trainer.max_steps", "3", "--trainer.enable_progress_bar", "false"]
            argv += ["--model.learning_rate", "0.01", "--fusion.rules", json.dumps(RULES)]
            assert main([*argv, "--trainer.default_root_dir", str(root / method)]) == 0
            fitted[method] = root / method
        return fitted[method]

    return folder


def rows_of(path: Path, rule: str) -> list[dict[str, Any]]:
    return [row for row in json.loads(path.read_text())["rows"] if row["rule"] == rule and row["denominator"] != "full"]


@pytest.mark.parametrize("method", METHODS)
def test_fit_scores_each_task_under_its_own_weights(method: str, run: Callable[[str], Path], tmp_path: Path) -> None:
    """Rows are those of `test` from the folder."""
    folder = run(method)
    for name in ("emr", "tall"):
        rows = {row["task"]: row for row in rows_of(folder / "results.json", name)}
        assert list(rows) == TASKS
        assert all(row["task_known"] and row["masks"]["bits_an_entry"] == 2 for row in rows.values())
        fused, output = folder / "fused" / name, tmp_path / f"{name}.json"
        argv = ["test", "--model.method", method, "--data.tasks", json.dumps(TASKS), *SMALL, "--output", str(output)]
        assert main([*argv, "--model.weights", str(fused)]) == 0
        tested = {row["task"]: row for row in rows_of(output, name)}
        assert {task: row["value"] for task, row in tested.items()} == {
            task: row["value"] for task, row in rows.items()
        }
        assert all(row["task_known"] for row in tested.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_sweep_and_report_do_as_fit_does(method: str, run: Callable[[str], Path], tmp_path: Path) -> None:
    folder = run(method)
    argv = ["sweep", "--runs", json.dumps([str(folder)]), "--rules", json.dumps(RULES), "--output", str(tmp_path / "s")]
    assert main(argv) == 0
    for name in RULES:
        swept, own = (rows_of(path / "results.json", name) for path in (tmp_path / "s", folder))
        assert {row["task"]: row["value"] for row in swept} == {row["task"]: row["value"] for row in own}, name
        assert {row["task_known"] for row in swept} == {name != "average"}
    assert main(["report", str(folder), str(tmp_path / "s"), "--output", str(tmp_path / "report")]) == 0
    told = (tmp_path / "report" / "report.md").read_text()
    assert told.count("Models that are told each input's task") >= 3  # of the run, and over fused and all tasks
    assert "emr: unified vector" in told.lower()


@pytest.mark.parametrize("method", METHODS)
def test_masks_of_a_folder_are_the_models_of_its_tasks(method: str, run: Callable[[str], Path], tmp_path: Path) -> None:
    folder, backbone = run(method), fusionlab.load_backbone("tiny-clip")
    inside = next(path for path in (folder / "adapters", folder / "finetuned") if path.is_dir())
    finetuned = {task: fusionlab.load(inside / task) for task in TASKS}
    made = fusionlab.fuse("emr", backbone, finetuned=finetuned).weights
    loaded = fusionlab.load(folder / "fused" / "emr").weights
    assert isinstance(loaded, MaskedVectors)
    assert loaded.scales == made.scales
    for task in TASKS:
        expected = fusionlab.weights_of(made, task, backbone)
        found = fusionlab.weights_of(loaded, task, backbone)
        assert type(found) is type(expected)
        if method != "tangent_lora":
            assert all(torch.equal(found[name], each) for name, each in expected.items())
            output = tmp_path / task
            recipe = {"base": "tiny-clip", "finetuned": {task: str(folder / "fused" / "emr")}, "output": str(output)}
            fusionlab.fuse_checkpoints(recipe | {"rule": "average", "save": "weights"})
            exported = fusionlab.load(output).weights
            assert all(torch.equal(exported[name], each) for name, each in found.items())
            assert not list((folder / "fused" / "emr").glob("fusion_stats*"))
    card = (folder / "fused" / "emr" / "README.md").read_text()
    assert "Masks of one vector on top of `tiny-clip`" in card
    assert "a mask M_t of one bit an entry for each of 2 tasks" in card
    assert "Size: unified vector" in card
    assert files_to_push(folder / "fused" / "emr") == ["README.md", "fusion.json", MASKS, UNIFIED]
    files = [load_file(folder / "fused" / "emr" / name) for name in (UNIFIED, MASKS)]
    bits, entries = sum(each.numel() * 8 for each in files[1].values()), sum(each.numel() for each in files[0].values())
    assert bits == 2 * entries


@pytest.mark.parametrize("method", METHODS[:2])
def test_fuse_streams_the_folder_of_the_run(method: str, run: Callable[[str], Path], tmp_path: Path) -> None:
    folder = run(method)
    finetuned = {task: str(folder / "adapters" / task) for task in TASKS}
    for name in ("emr", "tall_given"):
        recipe = {"base": "tiny-clip", "finetuned": finetuned, "rule": RULES[name], "output": str(tmp_path / name)}
        fusionlab.fuse_checkpoints(recipe)
        for file in (UNIFIED, MASKS):
            assert (tmp_path / name / file).read_bytes() == (folder / "fused" / name / file).read_bytes()
        one, other = (json.loads((at / "fusion.json").read_text()) for at in (tmp_path / name, folder / "fused" / name))
        for key in ("masks", "base_hash", "norms", "cosines", "scaling_coefficients"):
            assert one[key] == other[key], key
        assert one["row"]["task_known"]
    recipe |= {"rule": "tall", "output": str(tmp_path / "usual")}
    fusionlab.fuse_checkpoints(recipe)
    record = json.loads((tmp_path / "usual" / "fusion.json").read_text())
    assert record["masks"]["thresholds"] == dict.fromkeys(TASKS, 0.4)
    assert "no mask_threshold was given: 0.4" in record["notes"][0]
    found = {
        "model": "ClipModule",
        "data": {"class_path": "ImageTasks", "init_args": {"tasks": TASKS, "max_samples": 16}},
    }
    fusionlab.fuse_checkpoints(recipe | found | {"output": str(tmp_path / "found")})
    records = [json.loads((at / "fusion.json").read_text()) for at in (tmp_path / "found", folder / "fused" / "tall")]
    assert records[0]["rule"] == records[1]["rule"]
    assert records[0]["search"]["passes"] == records[1]["search"]["passes"] == 5
    assert records[0]["search"]["num_labels"] == 32


def test_tall_looks_at_each_tasks_validation_samples_under_its_own_mask(run: Callable[[str], Path]) -> None:
    record = json.loads((run("lora") / "fused" / "tall" / "fusion.json").read_text())
    scores = record["search"]["scores"]
    assert list(scores) == [f"{task} {value}" for task in TASKS for value in (0.2, 0.3, 0.4, 0.5, 0.6)]
    for task, chosen in record["masks"]["thresholds"].items():
        of_task = {float(name.split()[1]): score for name, score in scores.items() if name.startswith(task)}
        assert chosen == min(value for value, score in of_task.items() if score == max(of_task.values()))


def test_tables_keep_them_apart(run: Callable[[str], Path]) -> None:
    rows = json.loads((run("lora") / "results.json").read_text())["rows"]
    assert [line[0] for line in table(rows)[1]] == ["pretrained", "finetuned", "fused: average"]
    assert [line[0] for line in task_known_table(rows)[1]] == ["fused: emr", "fused: tall", "fused: tall_given"]
    better = [row | {"value": 1.0} if row["task_known"] else row for row in rows]
    assert best_cells(better) == best_cells(rows)


def test_predict_takes_the_one_task(
    run: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 200, 10)).save(tmp_path / "photos" / f"{number}.png")
    fused, outputs = run("lora") / "fused" / "emr", [tmp_path / "masks.csv", tmp_path / "full.csv"]
    argv = ["predict", "--data.images", str(tmp_path / "photos")]
    one = [*argv, "--data.tasks", "[signs]"]
    assert main([*one, "--model.weights", str(fused), "--output", str(outputs[0])]) == 0
    recipe = {"base": "tiny-clip", "finetuned": {"signs": str(fused)}, "rule": "average", "output": str(tmp_path / "f")}
    fusionlab.fuse_checkpoints(recipe | {"save": "weights"})
    assert main([*one, "--model.weights", str(tmp_path / "f"), "--output", str(outputs[1])]) == 0
    assert outputs[0].read_text() == outputs[1].read_text()
    assert outputs[0].read_text().count(".png") == 3
    assert main([*argv, "--data.tasks", json.dumps(TASKS), "--model.weights", str(fused), "--output", "x.csv"]) == 2
    assert "these weights are of one task at a time" in capsys.readouterr().err


def test_what_cannot_be_is_refused(
    run: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fused = run("lora") / "fused" / "emr"
    argv = ["test", "--data.tasks", "[digits, shapes]", *SMALL, "--model.weights", str(fused)]
    assert main([*argv, "--output", str(tmp_path / "rows.json")]) == 2
    assert "no mask for task 'shapes': these weights know digits, signs" in capsys.readouterr().err
    argv = ["fit", "--fusion.rules", "[emr]", "--fusion.dtype", "bfloat16"]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
    assert "rules emr make masks, which are not rounded" in capsys.readouterr().err
    finetuned = {task: str(run("lora") / "adapters" / task) for task in TASKS}
    recipe = {"base": "tiny-clip", "finetuned": finetuned, "rule": "emr", "output": str(tmp_path / "out")}
    for field, value in {"save": "adapter", "input_dtype": "bfloat16", "rank": 4, "chat_template": "auto"}.items():
        with pytest.raises(fusionlab.InputError, match=f"{field}: emr writes masks over the base as it is"):
            fusionlab.fuse_checkpoints(recipe | {field: value})
    changed = tmp_path / "changed"
    shutil.copytree(fused, changed)
    record = json.loads((changed / "fusion.json").read_text())
    (changed / "fusion.json").write_text(json.dumps(record | {"base_hash": "0123456789abcdef"}))
    with pytest.raises(fusionlab.InputError, match=r"masks 'digits' in .* were made for another base"):
        fusionlab.fuse_checkpoints(recipe | {"finetuned": {"digits": str(changed)}, "rule": "average"})
    with pytest.raises(fusionlab.InputError, match="was made for another base"):
        fusionlab.fuse("average", fusionlab.load_backbone("tiny-clip"), finetuned={"digits": changed})
    record["masks"]["scales"].pop("signs")
    (changed / "fusion.json").write_text(json.dumps(record))
    with pytest.raises(fusionlab.InputError, match=r"masks of .* do not fit unified.safetensors and 1 tasks"):
        fusionlab.load(changed)
    module = fusionlab.ClipModule("tiny-clip")
    loaded = fusionlab.load(fused)
    with pytest.raises(fusionlab.InputError, match="these weights are by task"), module.use(loaded.weights):
        pass
    with pytest.raises(fusionlab.InputError, match="each task has weights of its own"):
        _ = fuse_weights(fusionlab.rules.Emr(), {"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}}).state
    assert not (tmp_path / "out").exists()
