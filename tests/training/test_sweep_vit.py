"""`sweep` over ViTs: every run's points are scored with the heads that the run trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTModel

from fusionlab.__main__ import main

TASKS = ["digits", "signs"]
METHODS, SEEDS = ["lora", "tangent_lora"], [1, 2]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(root / "base")
    runs = [str(root / f"{method}-{seed}") for method in METHODS for seed in SEEDS]
    argv = ["fit", "--model", "ViTModule", "--model.backbone", str(root / "base"), "--model.learning_rate", "0.02"]
    argv += ["--data.tasks", json.dumps(TASKS), "--data.max_samples", "64", "--data.eval_batch_size", "64"]
    argv += ["--trainer.max_steps", "8", "--trainer.enable_progress_bar", "false", "--fusion.rules", "[average, ties]"]
    for run in runs:
        method, seed = Path(run).name.split("-")
        own = ["--model.method", method, "--seed_everything", seed, "--trainer.default_root_dir", run]
        assert main([*argv, *own]) == 0
    searched = {"class_path": "lorahub", "init_args": {"budget": 2}}
    rules = json.dumps({"average": "average", "ties": "ties", "lorahub": searched})
    assert main(["sweep", "--runs", json.dumps(runs), "--rules", rules, "--output", str(root / "sweep")]) == 0
    return root


def of_rule(path: Path, rule: str, **wanted: Any) -> dict[str, float]:
    rows = [row for row in json.loads(path.read_text())["rows"] if row["rule"] == rule and row["denominator"] == "own"]
    return {row["task"]: row["value"] for row in rows if wanted.items() <= row.items()}


@pytest.mark.parametrize("rule", ["average", "ties"])
def test_points_are_those_of_the_fit(swept: Path, rule: str) -> None:
    found = []
    for method in METHODS:
        for seed in SEEDS:
            own = of_rule(swept / f"{method}-{seed}" / "results.json", rule)
            assert of_rule(swept / "sweep" / "results.json", rule, method=method, seed=seed) == own
            found.append(own)
    assert len({tuple(values.values()) for values in found}) > 2  # heads and weights differ by run


def test_heads_are_part_of_a_points_identity(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(swept / f"lora-{seed}") for seed in SEEDS]
    argv = ["sweep", "--rules", "[average]", "--output", str(tmp_path / "out"), "--runs"]
    assert main([*argv, json.dumps(runs)]) == 0
    heads, others = (Path(run) / "heads" / "signs" for run in runs)
    kept = (heads / "model.safetensors").read_bytes()
    (heads / "model.safetensors").write_bytes((others / "model.safetensors").read_bytes())
    assert main([*argv, json.dumps(runs)]) == 0
    points = [json.loads(path.read_text()) for path in (tmp_path / "out" / "ledger" / "points").rglob("*.json")]
    assert sorted(point["seed"] for point in points) == [1, 1, 2]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]  # of the heads that are there now
    assert sorted((row["seed"], row["task"]) for row in rows) == [(s, t) for s in SEEDS for t in TASKS]
    [line] = json.loads((tmp_path / "out" / "sweep.json").read_text())["summary"]
    assert (line["num_subsets"], line["num_seeds"]) == (1, 2)
    (heads / "model.safetensors").unlink()
    capsys.readouterr()
    assert main([*argv, json.dumps(runs[::-1]), "--dry_run"]) == 2  # before anything is computed
    assert "no head for task 'signs'" in capsys.readouterr().err
    (heads / "model.safetensors").write_bytes(kept)
