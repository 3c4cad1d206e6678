"""``--ckpt_path``: training goes on from it where it is of the same training; anything else is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fusionlab
from fusionlab.__main__ import main

pytestmark = pytest.mark.filterwarnings(  # of Lightning, about callbacks that are left out or save elsewhere now
    "ignore:.*callbacks used to create the checkpoint", "ignore:.*The dirpath has changed"
)
DATA = ["--data.tasks", '["textures", "shapes"]', "--data.max_samples", "16", "--data.eval_batch_size", "16"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
SETTINGS = ["--data.batch_size", "4", "--model.rank", "2", "--fusion.rules", "[average]"]
SETTINGS += ["--model.learning_rate", "0.01", "--model.lr_schedule", "constant"]
SAVES = '[{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 3, "save_top_k": -1}}]'


def fit(root: Path, *flags: str, data: list[str] = DATA, settings: list[str] = SETTINGS, max_steps: int = 6) -> int:
    argv = ["fit", *data, *QUIET, *settings, "--trainer.max_steps", str(max_steps), *flags]
    return main([*argv, "--trainer.default_root_dir", str(root)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of six steps, with a checkpoint after three."""
    root = tmp_path_factory.mktemp("whole") / "run"
    assert fit(root, "--trainer.callbacks", SAVES) == 0
    return root


def at(root: Path, step: int) -> Path:
    return next((root / "checkpoints").glob(f"*step={step}.ckpt"))


def results(root: Path) -> Any:
    return json.loads((root / "results.json").read_text())


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert results(ours) == results(theirs)
    for task in ("textures", "shapes"):
        name = f"adapters/{task}/adapter_model.safetensors"
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_training_goes_on_from_it(whole: Path, tmp_path: Path) -> None:
    assert fit(tmp_path / "run", "--ckpt_path", str(at(whole, 3)), "--trainer.callbacks", SAVES) == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_longer_run_goes_on_from_an_end(whole: Path, tmp_path: Path) -> None:
    last = whole / "checkpoints" / "last.ckpt"
    assert fit(tmp_path / "run", "--ckpt_path", str(last), max_steps=8) == 0
    assert fit(tmp_path / "anew", max_steps=8) == 0
    assert_same_run(tmp_path / "run", tmp_path / "anew")
    assert results(tmp_path / "run") != results(whole)


CHANGED: dict[str, tuple[list[str], list[str], str]] = {
    "another task": (["--data.tasks", "[textures, digits]", *DATA[2:]], SETTINGS, "tasks (textures, shapes there"),
    "fewer tasks": (["--data.tasks", "[textures]", *DATA[2:]], SETTINGS, "tasks (textures, shapes there"),
    "another order": (["--data.tasks", "[shapes, textures]", *DATA[2:]], SETTINGS, "tasks (textures, shapes there"),
    "another rank": (DATA, [*SETTINGS, "--model.rank", "4"], "A₀"),
    "another seed": (DATA, [*SETTINGS, "--seed_everything", "1"], "A₀"),
    "another method": (DATA, [*SETTINGS, "--model.method", "l_lora"], "method (lora there, l_lora here)"),
    "full": (DATA, [*SETTINGS, "--model.method", "full"], "method (lora there, full here)"),
    "another scale": (DATA, [*SETTINGS, "--model.lora_alpha", "4"], "lora_alpha (32"),
    "other layers": (DATA, [*SETTINGS, "--model.target_modules", "[k_proj]"], "A₀"),
    "another rate": (DATA, [*SETTINGS, "--model.learning_rate", "0.02"], "learning_rate (0.01 there, 0.02 here)"),
    "another decay": (DATA, [*SETTINGS, "--model.weight_decay", "0.1"], "weight_decay (0.0 there, 0.1 here)"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_checkpoint_of_another_training_is_refused(
    case: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, settings, message = CHANGED[case]
    code = fit(tmp_path / "run", "--ckpt_path", str(at(whole, 3)), data=data, settings=settings)
    told = capsys.readouterr().err
    assert (code, message in told, "Traceback" in told) == (2, True, False), told
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_home_folder_is_meant_by_its_sign(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(at(whole, 3).parent))
    assert fit(tmp_path / "run", f"--ckpt_path=~/{at(whole, 3).name}", max_steps=2) == 2
    assert f"{str(at(whole, 3))!r} is at step 3, past trainer.max_steps 2" in capsys.readouterr().err


def without_optimizer(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in checkpoint.items() if key != "optimizer_states"}, path)


FILES: dict[str, tuple[Any, str]] = {
    "nothing": (lambda path: path.unlink(), "no file"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "cut short"),
    "empty": (lambda path: path.write_bytes(b""), "cut short"),
    "a text": (lambda path: path.write_text("adapters"), "is no checkpoint"),
    "weights only": (without_optimizer, "lacks optimizer_states"),
    "a tensor": (lambda path: torch.save(torch.zeros(2), path), "lacks state_dict"),
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_no_checkpoint_is_refused(
    case: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FILES[case]
    change(shutil.copy(at(whole, 3), tmp_path / "given.ckpt") and tmp_path / "given.ckpt")
    assert fit(tmp_path / "run", "--ckpt_path", str(tmp_path / "given.ckpt")) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()


OTHERS: dict[str, tuple[list[str], int, str]] = {
    "last": (["--ckpt_path", "last"], 6, "give a file"),
    "best": (["--ckpt_path", "best"], 6, "give a file"),
    "registry": (["--ckpt_path", "registry:model"], 6, "give a file"),
    "past the end": (["--ckpt_path", "GIVEN"], 2, "is at step 3, past trainer.max_steps 2"),
    "a trial": (["--ckpt_path", "GIVEN", "--trainer.fast_dev_run", "1"], 6, "leave one out"),
    "weights_only alone": (["--weights_only", "true"], 6, "which is not given"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_cannot_be_gone_on_from_is_refused(
    case: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, max_steps, message = OTHERS[case]
    flags = [str(at(whole, 3)) if flag == "GIVEN" else flag for flag in flags]
    assert fit(tmp_path / "run", *flags, max_steps=max_steps) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize("flag", ["--ckpt_path", "--weights_only"])
def test_commands_that_score_refuse_it(
    command: str, flag: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [command, *DATA, *QUIET, flag, str(at(whole, 3)) if flag == "--ckpt_path" else "true"]
    assert main([*argv, "--output", str(tmp_path / "out.json")]) == 2
    assert f"do nothing in {command}" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_an_unfinished_run_goes_on_from_its_own(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, original = tmp_path / "run", fusionlab.ClipModule.loss

    def loss(self: fusionlab.ClipModule, task: str, batch: dict[str, Any]) -> torch.Tensor:
        if self.global_step == 5:
            raise KeyError
        return original(self, task, batch)

    flags = ["--ckpt_path", str(at(whole, 3)), "--checkpoint_every_n_steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(fusionlab.ClipModule, "loss", loss)
        with pytest.raises(KeyError):
            fit(root, *flags)
    shutil.copy(at(whole, 6), tmp_path / "other.ckpt")
    assert fit(root, "--ckpt_path", str(tmp_path / "other.ckpt")) == 2
    assert "goes on from its own" in capsys.readouterr().err
    steps: list[int] = []

    def watched(self: fusionlab.ClipModule, task: str, batch: dict[str, Any]) -> torch.Tensor:
        steps.append(self.global_step)
        return original(self, task, batch)

    monkeypatch.setattr(fusionlab.ClipModule, "loss", watched)
    assert fit(root, *flags) == 0
    assert set(steps) == {5}
    assert_same_run(root, whole)
    assert fit(root, "--ckpt_path", str(root / "checkpoints" / "last.ckpt"), "--overwrite") == 2
    assert "leave one out" in capsys.readouterr().err
