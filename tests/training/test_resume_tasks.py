"""Tasks trained by several jobs in one run folder, or added later, equal one `fit` over all of them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
import yaml

from fusionlab import ClipModule
from fusionlab.__main__ import main
from fusionlab.errors import InputError
from fusionlab.runs.folder import RunFolder
from fusionlab.runs.leases import LEASE_SECONDS, Leases

FIT = [
    "fit", "--data.max_samples", "40", "--data.batch_size", "8", "--model.rank", "2", "--model.dropout", "0.2",
    "--trainer.max_steps", "6", "--trainer.accelerator", "cpu", "--fusion.rules", "[ties]",
    "--trainer.enable_progress_bar", "false", "--trainer.accumulate_grad_batches", "2", "--model.samples_at_once", "0",
]  # fmt: skip
BOTH = "[digits, signs]"


def fit(root: Path, tasks: str, *extra: str) -> int:
    return main([*FIT, "--data.tasks", tasks, "--trainer.default_root_dir", str(root), *extra])


def weights(root: Path, task: str) -> bytes:
    return (root / "adapters" / task / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("together") / "run"
    assert fit(root, BOTH) == 0
    return root


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs that train, then the one that fuses."""
    root = tmp_path_factory.mktemp("apart") / "run"
    for tasks in ("[digits]", "[signs]"):
        assert fit(root, tasks, "--train_only") == 0
    return root


def assert_same_results(ours: Path, theirs: Path) -> None:
    assert (ours / "results.json").read_bytes() == (theirs / "results.json").read_bytes()
    for task in ("digits", "signs"):
        assert weights(ours, task) == weights(theirs, task)
    fused = Path("fused") / "ties" / "model.safetensors"
    assert (ours / fused).read_bytes() == (theirs / fused).read_bytes()


def test_a_task_trains_alone_as_beside_others_and_a_last_job_fuses(
    together: Path, apart: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path.name for path in apart.iterdir()} == {"adapters", "parts"}
    for task in ("digits", "signs"):
        assert weights(apart, task) == weights(together, task)
    assert fit(apart, "[signs]", "--train_only") == 2
    assert "is finished" in capsys.readouterr().err
    assert fit(apart, BOTH, "--model.learning_rate", "0.5") == 2
    assert "digits in " in (message := capsys.readouterr().err)
    assert "model.init_args.learning_rate (0.003 before, 0.5 now)" in message
    assert not (apart / "config.yaml").exists()

    def trained(*_: object) -> None:
        raise AssertionError("both tasks are trained already")

    monkeypatch.setattr(ClipModule, "training_step", trained)
    assert fit(apart, BOTH) == 0
    assert_same_results(apart, together)


def test_tasks_are_added_to_a_finished_run(
    together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    assert fit(root, "[signs]") == 0
    assert fit(root, BOTH, "--trainer.max_steps", "7") == 2
    assert "is finished with another configuration" in capsys.readouterr().err
    trained: list[str] = []
    original = ClipModule.loss

    def loss(self: ClipModule, task: str, batch: dict) -> torch.Tensor:
        trained.append(task)
        return original(self, task, batch)

    monkeypatch.setattr(ClipModule, "loss", loss)
    assert fit(root, BOTH) == 0
    assert set(trained) == {"digits"}
    assert_same_results(root, together)
    assert yaml.safe_load((root / "config.yaml").read_text())["data"]["init_args"]["tasks"] == ["digits", "signs"]
    assert fit(root, BOTH) == 2
    assert "is finished;" in capsys.readouterr().err


def test_another_start_is_refused(apart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = RunFolder(apart).part(["signs"]).path
    copied = RunFolder(tmp_path / "run").part(["signs"]).path
    (copied / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "trained.json"):
        (copied / name).write_bytes((part / name).read_bytes())
    checkpoint = torch.load(part / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(checkpoint | {"a0_hash": "other"}, copied / "checkpoints" / "last.ckpt")
    assert fit(tmp_path / "run", BOTH) == 2
    assert "signs in" in (message := capsys.readouterr().err)
    assert "started from another A₀ (hash other" in message


def test_train_only_needs_a_folder_and_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "--data.tasks", "[digits]", "--train_only"]) == 2
    assert "give --trainer.default_root_dir" in capsys.readouterr().err
    assert (
        fit(tmp_path / "run", "[digits]", "--train_only", "--trainer.max_steps", "-1", "--trainer.max_epochs", "1") == 2
    )
    assert "train_only needs --trainer.max_steps" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def lease(folder: Path, **owner: object) -> Path:
    path = folder / "digits.json"
    folder.mkdir(parents=True, exist_ok=True)
    own = Leases(folder).owner
    path.write_text(json.dumps({**own, **owner}))
    return path


def test_no_two_jobs_train_one_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lease(tmp_path / "run" / "leases", host="elsewhere", pid=12, job="77_3")
    assert fit(tmp_path / "run", BOTH) == 2
    assert "task 'digits' is being trained by process 12 on elsewhere, job 77_3" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"leases"}


def test_leases_are_held_and_given_back(tmp_path: Path) -> None:
    held = lease(tmp_path, pid=os.getppid())
    with pytest.raises(InputError, match=f"by process {os.getppid()} on"):
        Leases(tmp_path).take_tasks(["signs", "digits"])
    assert [path.name for path in tmp_path.iterdir()] == ["digits.json"]  # signs was given back
    aged = time.time() - LEASE_SECONDS - 5
    os.utime(held, (aged, aged))
    leases = Leases(tmp_path, seconds=0.04)
    leases.take_tasks(["signs", "digits"])
    os.utime(held, (aged, aged))
    deadline = time.monotonic() + 10
    while held.stat().st_mtime < aged + LEASE_SECONDS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held.stat().st_mtime > aged + LEASE_SECONDS  # the thread renews it
    assert json.loads(held.read_text())["pid"] == os.getpid()
    leases.close()
    assert not tmp_path.exists()


@pytest.mark.parametrize("dead", ["process", "job"])
def test_a_dead_job_s_lease_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    folder = tmp_path / "leases"
    path = (
        lease(folder, pid=2**22 + 1, job="4")
        if dead == "process"
        else lease(folder, host="elsewhere", job="5", restart=0)
    )
    leases = Leases(folder)
    leases.take_tasks(["digits"])
    assert json.loads(path.read_text()) == leases.owner
    leases.close()


def test_a_process_of_the_same_job_is_not_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    lease(tmp_path, host="elsewhere")
    with pytest.raises(InputError, match="on elsewhere, job 5; its last sign of life"):
        Leases(tmp_path).take_tasks(["digits"])
