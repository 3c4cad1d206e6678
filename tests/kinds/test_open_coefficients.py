"""Coefficients that a rule leaves open, by itself or inside transforms, and those that are found by parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from often import often
from safetensors.torch import load_file
from small_bases import write_small_bases

import fusionlab
from fusionlab.__main__ import main
from fusionlab.fusion.base import Base
from fusionlab.rules import from_config, is_open, with_coefficient

# PEFT asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TASKS = ["digits", "signs"]
DATA = ["--data.tasks", json.dumps(TASKS), "--data.max_samples", "48", "--data.eval_batch_size", "24"]


def of(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


OPEN: dict[str, Any] = {
    "plain": "task_arithmetic",
    "dare": of("dare", rule="task_arithmetic", drop_rate=0.3),
    "trim": of("trim", rule="task_arithmetic", density=0.5),
    "della": of("della", rule="task_arithmetic"),
    "both": of("dare", rule=of("trim", rule="task_arithmetic", density=0.5)),
    "by_name": of("dare", rule=of("task_arithmetic", by_name={"*.0.*": 0.1}), drop_rate=0.3),
}


def coefficient_of(config: dict[str, Any]) -> float:
    while "rule" in config["init_args"]:
        config = config["init_args"]["rule"]
    return config["init_args"]["scaling_coefficient"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_small_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def run(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "run"
    argv = ["fit", *DATA, "--trainer.max_steps", "8", "--trainer.enable_progress_bar", "false"]
    argv += ["--model.backbone", str(bases["open_clip"]), "--model.learning_rate", "0.03"]
    assert main([*argv, "--fusion.rules", json.dumps(OPEN), "--trainer.default_root_dir", str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def swept(run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("sweep") / "out"
    assert main(["sweep", "--runs", json.dumps([str(run)]), "--rules", json.dumps(OPEN), "--output", str(output)]) == 0
    return json.loads((output / "results.json").read_text())["rows"]


@pytest.mark.parametrize("name", OPEN)
def test_fit_and_sweep_choose_the_same_on_validation(name: str, run: Path, swept: list[dict[str, Any]]) -> None:
    chosen = json.loads((run / "fused" / name / "fusion.json").read_text())
    assert 0 < coefficient_of(chosen["rule"]) <= 3
    rows = [row for row in json.loads((run / "results.json").read_text())["rows"] if row["rule"] == name]
    others = [row for row in swept if row["rule"] == name and row["denominator"] == "own"]
    values, other_values = ({row["task"]: row["value"] for row in of_command} for of_command in (rows, others))
    assert values == other_values
    assert set(values) == set(TASKS)


@pytest.mark.parametrize("name", OPEN)
def test_the_choice_scores_best_on_validation(name: str, run: Path, bases: dict[str, Path]) -> None:
    data = fusionlab.ImageTasks(TASKS, max_samples=48, eval_batch_size=24)
    module = fusionlab.ClipModule(str(bases["open_clip"]))
    data.image_size = module.backbone.image_size
    data.setup()
    module.prepare_tasks(data.tasks)
    finetuned = {task: run / "adapters" / task for task in TASKS}
    record = json.loads((run / "fused" / name / "fusion.json").read_text())
    looked_at = {float(value): score for value, score in record["search"]["scores"].items()}
    assert 3 < len(looked_at) < 12
    for value, score in looked_at.items():
        rule = with_coefficient(from_config(OPEN[name]), value)
        with module.use(fusionlab.fuse(rule, module.backbone, finetuned=finetuned).weights):
            rows = fusionlab.evaluate(module, data, TASKS, "validation")
        assert sum(row["value"] for row in rows) / len(TASKS) == pytest.approx(score, abs=1e-12)
    assert looked_at[coefficient_of(record["rule"])] == max(looked_at.values())


@pytest.mark.parametrize("name", OPEN)
def test_fuse_takes_the_usual_one_and_says_so(
    name: str, run: Path, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_open(from_config(OPEN[name]))
    finetuned = {task: str(run / "adapters" / task) for task in TASKS}
    recipe = {
        "base": str(bases["open_clip"]),
        "finetuned": finetuned,
        "rule": OPEN[name],
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["fuse", "--config", str(tmp_path / "recipe.yaml")]) == 0
    record = json.loads((tmp_path / "out" / "fusion.json").read_text())
    assert coefficient_of(record["rule"]) == 0.3
    assert "no scaling_coefficient was given: 0.3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "method"),
    often(
        [("vit", "lora"), ("open_clip", "full"), ("vit", "full"), ("open_clip", "lora"), ("open_clip", "tangent_lora")],
        "vit-lora",
        "open_clip-full",
    ),
)
def test_coefficients_found_by_parameter_are_those_of_names_on_disk(
    kind: str, method: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """AdaMerging over layers finds a rule with a coefficient for each unit, which `fuse` can be given."""
    run, output = tmp_path / "run", tmp_path / "sweep"
    model = ["--model", "ViTModule" if kind == "vit" else "ClipModule", "--model.backbone", str(bases[kind])]
    argv = ["fit", *DATA, *model, "--model.method", method, "--trainer.max_steps", "3", "--fusion.rules", "{}"]
    assert main([*argv, "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(run)]) == 0
    search = {"found": of("adamerging", scope="layer", num_steps=2, batch_size=4, learning_rate=0.1)}
    argv = ["sweep", "--runs", json.dumps([str(run)]), "--rules", json.dumps(search), "--output", str(output)]
    assert main(argv) == 0
    records = [json.loads(path.read_text()) for path in (output / "ledger" / "points").rglob("*.json")]
    [rule] = [record["rule_config"] for record in records if record["kind"] == "search"]
    by_name = rule["init_args"]["by_name"]
    assert len({tuple(values.values()) for values in by_name.values()}) > 1  # it moved
    backbone = fusionlab.load_backbone(str(bases[kind]))
    base = Base.of(backbone)
    apart = {name for name in base.layout.renamed(base.state) if "lora" in method}
    assert set(by_name) <= set(base.stored) | apart
    parent = run / ("finetuned" if method == "full" else "adapters")
    fused = fusionlab.fuse(rule, backbone, finetuned={task: parent / task for task in TASKS})
    assert json.loads(json.dumps(by_name)) == {
        name: {task: fused.scaling_coefficients[task][name] for task in TASKS} for name in by_name
    }


def test_a_tensor_of_a_base_is_found_under_its_name_on_disk(bases: dict[str, Path]) -> None:
    for kind, folder in bases.items():
        base = Base.of(fusionlab.load_backbone(str(folder)))
        stored = load_file(next(folder.glob("*.safetensors")))
        assert set(base.stored) == set(stored), kind
        assert all(torch.equal(value, stored[name]) for name, value in base.stored.items())
