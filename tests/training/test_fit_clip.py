"""`fit`, `test` and `predict` on tiny-clip: the run folder, its numbers, and what stays untouched."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel

import fusionlab
from fusionlab import adapters
from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS, load_backbone
from fusionlab.callbacks import FusionCallback
from fusionlab.evaluation.rows import ROW_FIELDS

TASKS, SIZE = ["digits", "signs", "textures"], ["--data.max_samples", "48", "--data.eval_batch_size", "32"]
FIT = [
    "fit",
    "--data.tasks",
    json.dumps(TASKS),
    *SIZE,
    "--trainer.max_steps",
    "5",
    "--trainer.enable_progress_bar",
    "false",
]
RULES = ["average", "task_arithmetic", "metagpt", "ties"]


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["rows"]


def fit(root: Path, *extra: str) -> Path:
    assert main([*FIT, "--trainer.default_root_dir", str(root), *extra]) == 0
    return root


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("runs") / "lora")


@pytest.fixture(scope="module")
def l_lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("runs") / "l_lora", "--model.method", "l_lora")


def test_the_run_folder_is_whole(lora_run: Path) -> None:
    names = {path.name for path in lora_run.iterdir()}
    assert names == {"config.yaml", "checkpoints", "adapters", "fused", "results.json", "results.md", "plots"}
    assert {path.name for path in (lora_run / "adapters").iterdir()} == set(TASKS)
    assert {path.name for path in (lora_run / "fused").iterdir()} == set(RULES)
    rows = rows_of(lora_run)
    assert all(tuple(row) == ROW_FIELDS for row in rows)
    found = {(row["model"], row["rule"], row["task"]) for row in rows}
    expected = {("pretrained", None, task) for task in TASKS} | {("finetuned", None, task) for task in TASKS}
    assert found == expected | {("fused", rule, task) for rule in RULES for task in TASKS}
    assert {(row["num_samples"], row["split"], row["seed"]) for row in rows} == {(48, "test", 42)}
    metagpt = next(row["scaling_coefficients"] for row in rows if row["rule"] == "metagpt")
    assert sum(metagpt.values()) == pytest.approx(1.0, abs=1e-12)


def test_one_seed_gives_identical_results(lora_run: Path, tmp_path: Path) -> None:
    again = fit(tmp_path / "again")
    assert (again / "results.json").read_bytes() == (lora_run / "results.json").read_bytes()
    other = fit(tmp_path / "other", "--seed_everything", "7")
    assert rows_of(other)[0]["seed"] == 7
    adapter = "adapters/digits/adapter_model.safetensors"
    assert (again / adapter).read_bytes() == (lora_run / adapter).read_bytes()
    assert (other / adapter).read_bytes() != (lora_run / adapter).read_bytes()


@pytest.mark.parametrize("rule", RULES)
def test_test_command_gives_the_rows_of_fit(lora_run: Path, tmp_path: Path, rule: str) -> None:
    argv = ["test", "--data.tasks", json.dumps(TASKS), *SIZE, "--model.weights", str(lora_run / "fused" / rule)]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path)]) == 0
    scored = {row["task"]: row for row in rows_of(tmp_path)}
    for row in rows_of(lora_run):
        if row["rule"] == rule:
            same = {key: row[key] for key in row if key not in ("denominator", "normalized")}
            assert {key: scored[row["task"]][key] for key in same} == same


def test_adapters_load_in_stock_peft(lora_run: Path, l_lora_run: Path) -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for folder in [run / kind for run in (lora_run, l_lora_run) for kind in ("adapters/signs", "fused/metagpt")]:
        backbone = load_backbone("tiny-clip")
        adapter = adapters.load_adapter(folder)
        with adapters.added(backbone.model, adapter), torch.no_grad():
            ours = backbone.image_features(images)
        backbone.model = PeftModel.from_pretrained(
            CLIPModel.from_pretrained(ASSETS / "tiny-clip"), folder
        ).base_model.model
        with torch.no_grad():
            theirs = backbone.image_features(images)
            unadapted = load_backbone("tiny-clip").image_features(images)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert (ours - unadapted).abs().max() > 1e-4


def test_offline_fuse_of_the_adapters_equals_the_run(l_lora_run: Path, tmp_path: Path) -> None:
    kept = {task: (l_lora_run / "adapters" / task / "fusion_stats.json").read_bytes() for task in TASKS}
    for rule in ("metagpt", "ties"):
        argv = ["fuse", "--base", str(ASSETS / "tiny-clip"), "--rule", rule, "--output", str(tmp_path / rule)]
        for task in TASKS:
            argv += [f"--finetuned.{task}", str(l_lora_run / "adapters" / task)]
        assert main(argv) == 0
    ours = json.loads((l_lora_run / "fused" / "metagpt" / "fusion.json").read_text())
    theirs = json.loads((tmp_path / "metagpt" / "fusion.json").read_text())
    assert theirs["scaling_coefficients"] == ours["scaling_coefficients"]
    in_run, offline = (fusionlab.load(folder).weights for folder in (l_lora_run / "fused" / "ties", tmp_path / "ties"))
    assert in_run.keys() == offline.keys()
    assert all(torch.equal(in_run[name], offline[name]) for name in in_run)
    # measured once, at export: fuse found what it would have measured itself
    assert kept == {task: (l_lora_run / "adapters" / task / "fusion_stats.json").read_bytes() for task in TASKS}


def test_l_lora_fuses_to_the_rank_of_one_and_reproduces_one_task(l_lora_run: Path) -> None:
    of_task = {task: adapters.load_adapter(l_lora_run / "adapters" / task) for task in TASKS}
    assert {rank for adapter in of_task.values() for rank in adapter.ranks.values()} == {16}
    fused = adapters.load_adapter(l_lora_run / "fused" / "task_arithmetic")
    assert set(fused.ranks.values()) == {16}
    alone = adapters.combine(of_task, {"*": {"signs": 1.0}})
    for module, factors in alone.factors.items():
        assert torch.equal(factors.lora_b, of_task["signs"].factors[module].lora_b)
        assert torch.equal(factors.lora_a, of_task["signs"].factors[module].lora_a)


def test_ties_is_a_full_model_in_the_bases_layout(lora_run: Path) -> None:
    model = CLIPModel.from_pretrained(lora_run / "fused" / "ties")
    base = CLIPModel.from_pretrained(ASSETS / "tiny-clip")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    assert changed
    assert all(
        name.startswith("vision_model.") and name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed
    )


def test_predict_labels_a_folder(lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("deep/b.jpg", "blue")):
        Image.new("RGB", (40, 50), colour).save(tmp_path / "images" / name)
    argv = ["predict", "--model.weights", str(lora_run / "fused" / "average"), "--data.tasks", "[colours]"]
    argv += ["--data.images", str(tmp_path / "images"), "--output", str(tmp_path / "labels.csv")]
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 0
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    assert f"{len(lines) - 1} predictions: " in capsys.readouterr().out
    assert lines[0] == "path,task,label,probability"
    assert [line.split(",")[0] for line in lines[1:]] == [str(tmp_path / "images" / n) for n in ("a.png", "deep/b.jpg")]


@pytest.mark.parametrize("rule", ["average", "ties"])
def test_fuse_takes_the_embedded_base_by_name(lora_run: Path, tmp_path: Path, rule: str) -> None:
    finetuned = json.dumps({task: str(lora_run / "adapters" / task) for task in TASKS})
    argv = ["fuse", "--base", "tiny-clip", "--finetuned", finetuned, "--rule", rule]
    assert main([*argv, "--output", str(tmp_path / "fused")]) == 0
    name = "adapter_model.safetensors" if rule == "average" else "model.safetensors"
    offline, in_run = load_file(tmp_path / "fused" / name), load_file(lora_run / "fused" / rule / name)
    assert offline.keys() == in_run.keys()
    for key, value in offline.items():
        torch.testing.assert_close(value, in_run[key])


def test_finished_run_and_other_base_are_refused(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FIT, "--trainer.default_root_dir", str(lora_run)]) == 2
    assert "is finished" in capsys.readouterr().err
    other = load_backbone("tiny-clip")
    with torch.no_grad():
        other.model.vision_model.encoder.layers[0].self_attn.q_proj.weight.add_(0.1)
    other.model.save_pretrained(tmp_path / "other")
    other.save_files(tmp_path / "other")
    argv = ["test", "--data.tasks", "[digits]", "--model.backbone", str(tmp_path / "other")]
    assert main([*argv, "--model.weights", str(lora_run / "fused" / "average")]) == 2
    assert "made for another base (tiny-clip)" in capsys.readouterr().err


class _CheckedFusion(FusionCallback):
    fusions = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = {name: value.clone() for name, value in pl_module.state_dict().items()}
        state = torch.get_rng_state(), [part.training for part in pl_module.modules()]
        active = adapters.active(pl_module.base_model)
        super().on_train_epoch_end(trainer, pl_module)
        self.fusions += any(key.startswith("validation/") for key in trainer.callback_metrics)
        after = pl_module.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(state[0], torch.get_rng_state())
        assert state[1] == [part.training for part in pl_module.modules()]
        assert active == adapters.active(pl_module.base_model)


@pytest.mark.parametrize("method", ["lora", pytest.param("l_lora", marks=pytest.mark.slow)])
def test_python_fit_restores_the_state_and_freezes_the_base(method: str, tmp_path: Path) -> None:
    seed_everything(3)
    data = fusionlab.ImageTasks(["digits", "signs"], max_samples=64, batch_size=16, seed=3)
    module = fusionlab.ClipModule(method=method, dropout=0.1, seed=3)
    base = {name: value.clone() for name, value in module.base_model.state_dict().items()}
    fusion = _CheckedFusion(["metagpt", "ties"], every_n_epochs=1, finetuned_on="all")
    trainer = Trainer(
        max_epochs=2, callbacks=[fusion], default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_model_summary=False, limit_val_batches=0, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert trainer.global_step == 2 * len(data.train_dataloader()) == 8
    assert fusion.fusions == 2
    after = adapters.base_state(module.base_model)
    assert base.keys() == after.keys()
    assert all(torch.equal(base[name], after[name]) for name in base)
    assert module.injection.num_adapted_layers == 2 * len(module.base_model.vision_model.encoder.layers)
    finetuned = [row for row in rows_of(tmp_path) if row["model"] == "finetuned"]
    assert {(row["finetuned_on"], row["task"]) for row in finetuned} == {
        (on, task) for on in data.tasks for task in data.tasks
    }


def test_the_number_of_adapted_layers_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path / "run", "--fusion.rules", "[average]", "--trainer.max_steps", "1")
    layers = 2 * load_backbone("tiny-clip").model.config.vision_config.num_hidden_layers
    assert f"{layers} adapted layers, " in capsys.readouterr().out


def test_nan_loss_stops_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    original = fusionlab.ClipModule.loss

    def loss(self: fusionlab.ClipModule, task: str, batch: dict) -> torch.Tensor:
        steps.append(task)
        value = original(self, task, batch)
        return value * float("nan") if len(steps) > 3 * len(TASKS) and task == "signs" else value

    monkeypatch.setattr(fusionlab.ClipModule, "loss", loss)
    with pytest.raises(FloatingPointError, match=r"not finite at step 3 for signs \(nan\)"):
        fit(tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert not (tmp_path / "run" / "results.json").exists()
