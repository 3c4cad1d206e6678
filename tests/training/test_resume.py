"""`fit` killed at any moment and given again equals the uninterrupted run, bit for bit."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from fusionlab import ClipModule
from fusionlab.__main__ import main
from fusionlab.callbacks import FusionCallback, WholeCheckpointIO
from fusionlab.errors import InputError

STEPS = 30
FIT = [
    "fit", "--data.tasks", "[digits, signs]", "--data.max_samples", "48", "--data.batch_size", "4", "--model.rank", "2",
    "--model.dropout", "0.2", "--trainer.max_steps", str(STEPS), "--trainer.accelerator", "cpu",
    "--fusion.rules", "[ties]", "--trainer.enable_progress_bar", "false", "--checkpoint_every_n_steps", "3",
    "--trainer.gradient_clip_val", "1.0",
]  # fmt: skip


def run(argv: list[str], log: Path, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.exit(main(argv))


def start(root: Path, *extra: str, **environment: str) -> BaseProcess:
    argv = [*FIT, "--trainer.default_root_dir", str(root), *extra]
    process = ranks.CONTEXT.Process(target=run, args=(argv, root.with_suffix(".log"), environment))
    process.start()
    return process


def fit(root: Path, *extra: str) -> Path:
    assert main([*FIT, "--trainer.default_root_dir", str(root), *extra]) == 0
    return root


def checkpoint(root: Path) -> dict[str, Any]:
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)


def assert_equal(ours: Any, theirs: Any, where: str = "") -> None:
    """Nested equality, tensors bit for bit."""
    if isinstance(ours, torch.Tensor):
        assert ours.equal(theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}/{index}")
    else:
        assert ours == theirs, where


def assert_same_run(ours: Path, theirs: Path) -> None:
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_equal(checkpoint(ours)[key], checkpoint(theirs)[key], key)
    files = {root: sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (ours, theirs)}
    assert files[ours] == files[theirs]
    for name in ("results.json", "adapters/signs/adapter_model.safetensors", "fused/ties/model.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    return fit(tmp_path_factory.mktemp("whole") / "run")


def killed_until_done(root: Path, kills: int, seed: int) -> list[int | None]:
    """Kill ``kills`` times, each a random while after the run has moved on; then let it end. Returns the exit codes."""
    draw, codes = random.Random(seed), []
    path = root / "checkpoints" / "last.ckpt"
    for number in range(kills):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = start(root)
        while process.is_alive() and not (path.exists() and path.stat().st_mtime_ns > before):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.15))
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, signal.SIGTERM if number % 3 == 1 else signal.SIGKILL)
        process.join()
        codes.append(process.exitcode)
        if process.exitcode == 0:
            return codes
    process = start(root)
    process.join()
    return [*codes, process.exitcode]


@pytest.mark.slow
def test_killed_three_times_and_restarted_equals_uninterrupted(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    codes = killed_until_done(root, 3, seed=11)
    log = root.with_suffix(".log").read_text()
    assert codes == [-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGKILL, 0], log
    assert "stopped by SIGTERM; step " in log
    assert_same_run(root, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_twenty_times(whole: Path, tmp_path: Path, seed: int) -> None:
    root = tmp_path / "run"
    codes = killed_until_done(root, 5, seed)
    assert codes[-1] == 0, root.with_suffix(".log").read_text()
    assert_same_run(root, whole)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sends a signal to this process while it computes a step."""
    original = ClipModule.loss

    def arm(step: int, number: int) -> None:
        def loss(self: ClipModule, task: str, batch: dict) -> torch.Tensor:
            if self.global_step == step and task == "signs":
                os.kill(os.getpid(), number)
            return original(self, task, batch)

        monkeypatch.setattr(ClipModule, "loss", loss)

    yield arm
    monkeypatch.setattr(ClipModule, "loss", original)


def test_slurm_s_signal_saves_the_step_and_requeues(
    whole: Path, tmp_path: Path, stop_at: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "71", "ARRAY_JOB_ID": "70", "ARRAY_TASK_ID": "4"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    before = signal.getsignal(signal.SIGTERM)
    stop_at(16, signal.SIGUSR1)  # in the middle of the second epoch, and not where a save is due
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "run")
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert checkpoint(tmp_path / "run")["global_step"] == 17
    assert "stopped by SIGUSR1; step 17 is saved" in capsys.readouterr().err
    assert (tmp_path / "requeued").read_text() == "requeue 70_4\n"
    assert not (tmp_path / "run" / "leases").exists()
    stop_at(-1, 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    fit(tmp_path / "run", "--overwrite")  # the same job again, which goes on whatever it was started with
    assert_same_run(tmp_path / "run", whole)
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_was_killed_after_training_only_fuses(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(FusionCallback, "on_fit_end", killed)
        with pytest.raises(KeyError, match="killed here"):
            fit(tmp_path / "run")
    leftover = tmp_path / "run" / "checkpoints" / ".last.ckpt.tmp-99"
    leftover.write_bytes(b"half")
    monkeypatch.setattr(ClipModule, "training_step", killed)
    fit(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_checkpoint_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"step": 1}, path)

    def half(checkpoint: dict, file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(InputError, match=r"last\.ckpt' cannot be written: disk full"):
        WholeCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


@pytest.mark.slow
def test_another_number_of_processes_resumes_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    extra = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    processes = [start(root, *extra, LOCAL_RANK=rank, RANK=rank, **shared) for rank in ("0", "1")]
    path = root / "checkpoints" / "last.ckpt"
    while not path.exists() and all(process.is_alive() for process in processes):
        time.sleep(0.01)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGTERM)  # told to one of them, both end, at the same step
    for process in processes:
        process.join()
    log = root.with_suffix(".log").read_text()
    assert [process.exitcode for process in processes] == [128 + signal.SIGTERM] * 2, log
    assert log.count("stopped by SIGTERM; step ") == 2
    stopped = checkpoint(root)
    assert 0 < stopped["global_step"] < STEPS
    fit(root)
    said = capsys.readouterr().err
    assert "resumed by 1 processes, 2 before: an update now takes 4 samples of each task, 8 before" in said
    assert checkpoint(root)["global_step"] == STEPS


def test_a_missing_rank_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    for name, value in {"WORLD_SIZE": "3", "LOCAL_RANK": "0", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    root = tmp_path / "run"
    argv = [*FIT, "--trainer.default_root_dir", str(root), "--trainer.devices", "3", "--start_timeout", "1"]
    assert main(argv) == 2
    assert "rank 1, 2 of 0..2 did not come to 127.0.0.1:" in capsys.readouterr().err
    assert not root.exists()


def test_strategies_that_cannot_work_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for strategy in ("model_parallel", "deepspeed_stage_2", "ddp_spawn"):
        assert main([*FIT, "--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.strategy", strategy]) == 2
        message = capsys.readouterr().err
        assert f"'{strategy}' cannot work here" in message
        assert "use ddp" in message
    assert not (tmp_path / "run").exists()
