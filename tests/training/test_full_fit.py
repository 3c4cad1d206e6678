"""`fit` and `test` with method full: one copy of the encoder per task, in the base's own layout; resume; refusals."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import CLIPModel

import fusionlab
from fusionlab import adapters
from fusionlab.__main__ import main
from fusionlab.backbones import ASSETS, load_backbone

TASKS = ["digits", "signs"]
DATA = [
    "--data.tasks",
    json.dumps(TASKS),
    "--data.max_samples",
    "24",
    "--data.eval_batch_size",
    "24",
    "--data.batch_size",
    "8",
]
FIT = ["fit", *DATA, "--trainer.max_steps", "3", "--trainer.enable_progress_bar", "false", "--model.method", "full"]
RULES = ["average", "task_arithmetic", "metagpt", "ties"]


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "full"
    assert main([*FIT, "--trainer.default_root_dir", str(folder)]) == 0
    return folder


def test_finetuned_models_have_the_bases_layout(run: Path) -> None:
    assert {path.name for path in (run / "finetuned").iterdir()} == set(TASKS)
    assert not (run / "adapters").exists()
    base = CLIPModel.from_pretrained(ASSETS / "tiny-clip").state_dict()
    for task in TASKS:
        state = CLIPModel.from_pretrained(run / "finetuned" / task).state_dict()
        assert state.keys() == base.keys()
        changed = {name for name in state if not torch.equal(state[name], base[name])}
        assert changed
        assert all(name.startswith(("vision_model.", "visual_projection.")) for name in changed)
        assert "visual_projection.weight" in changed


def test_a_run_has_every_row_and_rule(run: Path) -> None:
    found = {(row["model"], row["rule"], row["task"]) for row in rows_of(run / "results.json")}
    expected = {(model, None, task) for model in ("pretrained", "finetuned") for task in TASKS}
    assert found == expected | {("fused", rule, task) for rule in RULES for task in TASKS}
    assert {row["method"] for row in rows_of(run / "results.json")} == {"full"}


@pytest.mark.parametrize("folder", ["finetuned/signs", "fused/metagpt", "fused/ties"])
def test_test_command_gives_the_rows_of_fit(run: Path, tmp_path: Path, folder: str) -> None:
    argv = ["test", *DATA, "--model.weights", str(run / folder), "--trainer.default_root_dir", str(tmp_path)]
    assert main(argv) == 0
    scored = {row["task"]: row["value"] for row in rows_of(tmp_path / "results.json")}
    name = Path(folder).name
    rows = [row for row in rows_of(run / "results.json") if name in (row["rule"], row["finetuned_on"])]
    assert rows
    assert {row["task"]: row["value"] for row in rows} == {row["task"]: scored[row["task"]] for row in rows}


def test_average_is_the_average_of_the_weights(run: Path) -> None:
    fused = CLIPModel.from_pretrained(run / "fused" / "average").state_dict()
    states = [CLIPModel.from_pretrained(run / "finetuned" / task).state_dict() for task in TASKS]
    for name, value in fused.items():
        torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2, rtol=1e-5, atol=1e-6)


def python_fit(root: Path, max_steps: int, ckpt_path: str | None = None) -> fusionlab.ClipModule:
    data = fusionlab.ImageTasks(TASKS, max_samples=24, batch_size=8, seed=3)
    module = fusionlab.ClipModule(method="full", seed=3, lr_schedule="constant")
    trainer = Trainer(
        max_steps=max_steps, default_root_dir=root, logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(root / "last.ckpt")
    return module


def test_tasks_are_trained_as_if_alone_and_resumed_as_if_uninterrupted(tmp_path: Path) -> None:
    base = {name: value.clone() for name, value in load_backbone("tiny-clip").model.state_dict().items()}
    whole = python_fit(tmp_path, 4)
    assert all(torch.equal(value, base[name]) for name, value in whole.base_model.state_dict().items())
    python_fit(tmp_path, 2)
    assert not any(
        name.startswith("backbone.") for name in torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    )
    resumed = python_fit(tmp_path, 4, str(tmp_path / "last.ckpt"))
    for task in TASKS:
        expected = whole.finetuned(task)
        assert any(not torch.equal(value, base[name]) for name, value in expected.items())
        assert all(torch.equal(value, expected[name]) for name, value in resumed.finetuned(task).items())
    assert any(
        not torch.equal(value, whole.finetuned("digits")[name]) for name, value in whole.finetuned("signs").items()
    )


def test_adapter_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting, message in (
        (["--model.dropout", "0.1"], "dropout 0.1 is for adapters; method 'full' trains all weights"),
        (["--model.target_modules", "[q_proj]"], "target_modules ['q_proj'] is for adapters"),
    ):
        assert main([*FIT, *setting, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_of_other_names_are_refused() -> None:
    module = fusionlab.ClipModule()
    with pytest.raises(fusionlab.errors.InputError, match=r"'vision_model.weight', the base does not"):  # noqa: SIM117
        with module.use({"vision_model.weight": torch.ones(1)}):
            pass
    with pytest.raises(fusionlab.errors.InputError, match=r"visual_projection.weight: the weights have shape \(1,\)"):  # noqa: SIM117
        with module.use({"visual_projection.weight": torch.ones(1)}):
            pass
    assert adapters.active(module.base_model) is None
