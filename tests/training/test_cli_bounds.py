"""Values out of bounds, damaged files and Ctrl-C: one message, and the exit code that says what happened."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

import fusionlab
from fusionlab.__main__ import main
from fusionlab.callbacks import StopOnSignal
from fusionlab.commands.sweep.recipe import SweepRecipe
from fusionlab.commands.trainer import is_restarted, lightning_errors, trainer_built

SMALL = [
    "--data.tasks", "[textures]", "--data.max_samples", "8", "--data.batch_size", "4", "--data.eval_batch_size", "8",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", "run",
]  # fmt: skip
FIT = ["fit", *SMALL, "--model.rank", "2", "--trainer.max_steps", "2", "--train_only"]
CPU = r"devices` selected with `CPUAccelerator` should be an int > 0, got {} with accelerator 'cpu'"
BOUNDS: dict[str, tuple[list[str], str]] = {
    "a negative seed": (["--seed_everything", "-1"], r"seed_everything must lie in 0\.\.4294967295, got -1"),
    "a large seed": (["--seed_everything", "99999999999"], "got 99999999999"),
    "all devices": (["--trainer.devices", "-1"], CPU.format("'-1'")),
    "devices by a word": (["--trainer.devices", "x"], CPU.format("'x'")),
    "a share of devices": (["--trainer.devices", "2.5"], CPU.format(r"'2\.5'")),
    "devices by number": (["--trainer.devices", "[0]"], CPU.format(r"\[0\]")),
    "some devices": (["--trainer.devices", "1,2"], CPU.format("'1,2'")),
    "an accelerator": (["--trainer.accelerator", "nope"], "invalid accelerator name: `accelerator='nope'`.*cpu"),
    "no nodes": (["--trainer.num_nodes", "0"], r"trainer\.num_nodes must be at least 1, got 0"),
    "a unit of time": (["--trainer.max_time", "{secs: 1}"], "no unit 'secs'; did you mean 'seconds'"),
    "a negative time": (["--trainer.max_time", "{seconds: -1}"], "max_time must not be negative, got -1 seconds"),
    "a long time": (["--trainer.max_time", "{days: 1000000000000}"], "is too long"),
    "validation never": (
        ["--trainer.check_val_every_n_epoch", "0", "--trainer.limit_val_batches", "1"],
        "check_val_every_n_epoch must be at least 1, got 0",
    ),
    "an interval of nothing": (
        ["--trainer.val_check_interval", "0", "--trainer.limit_val_batches", "1"], "val_check_interval 0 would never",
    ),
    "sanity": (
        ["--trainer.num_sanity_val_steps", "-2", "--trainer.limit_val_batches", "1"], "must be at least -1, got -2",
    ),
    "logs": (["--trainer.log_every_n_steps", "-1"], "log_every_n_steps must be at least 0, got -1"),
    "no batches": (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches must be at least 1, got 0"),
    "fewer batches": (["--trainer.accumulate_grad_batches", "-1"], "must be at least 1, got -1"),
    "uphill": (["--trainer.gradient_clip_val", "-1"], "gradient_clip_val must not be negative, got -1; 0 clips"),
    "decay": (["--model.weight_decay", "-1"], r"weight_decay must be at least 0, got -1\.0"),
    "warm-up": (["--model.num_warmup_steps", "-1"], "num_warmup_steps must be at least 0, got -1"),
    "no targets": (["--model.target_modules", "[]"], r"target_modules: expected at least one name, got \[\]"),
    "no steps": (["--trainer.max_steps", "0"], "max_steps 0 leaves nothing to train"),
    "no epochs": (["--trainer.max_epochs", "0"], "max_epochs 0 leaves nothing to train"),
    "more than most": (["--trainer.min_steps", "5"], r"min_steps 5 is more than trainer\.max_steps 2"),
    "more epochs": (
        ["--trainer.min_epochs", "5", "--trainer.max_epochs", "2"], r"min_epochs 5 is more than trainer\.max_epochs 2",
    ),
    "fewer than none": (["--trainer.min_steps", "-5"], "min_steps must be at least 0, got -5"),
    "a time to wait": (["--start_timeout", "-1"], r"start_timeout must be a positive number of seconds, got -1\.0"),
    "a seed of the model": (["--model.seed", "5"], "model.seed 5 does nothing beside seed_everything 42"),
    "a seed of the data": (["--data.init_args.seed=5"], "data.seed 5 does nothing beside seed_everything 42"),
    "a seed within": (["--model", "{class_path: ClipModule, init_args: {seed: 5}}"], "model.seed 5 does nothing"),
    "a seed in a file": (["--config", "seed.yaml"], "model.seed 7 does nothing .*; give seed_everything"),
    "an empty file": (["--config", "empty.yaml"], "'empty.yaml' holds nothing, expected a mapping"),
    "a list": (["--config=list.yaml"], "'list.yaml' holds a list, expected a mapping"),
    "another encoding": (["--config", "latin1.yaml"], "'latin1.yaml' is not YAML"),
    "a part in another encoding": (["--trainer", "latin1.yaml"], "'latin1.yaml' is not YAML"),
    "an empty part": (["--model", "empty.yaml"], "'empty.yaml' holds nothing"),
}  # fmt: skip
FILES = {
    "empty.yaml": b"",
    "list.yaml": b"- a\n",
    "latin1.yaml": "trainer: {max_steps: 2}  # é\n".encode("latin-1"),
    "seed.yaml": b"model: {class_path: ClipModule, init_args: {seed: 7}}\n",
    "seeds.yaml": b"seed_everything: 7\nmodel: {class_path: ClipModule, init_args: {seed: 7}}\n",
}


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """SIGINT is handled, also where these tests run in a background that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(argv: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    code = main(argv)
    stderr = capsys.readouterr().err
    assert (code, stderr.count("\n")) == (2, 1), stderr
    assert re.search(message, stderr), stderr
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("case", BOUNDS)
def test_what_is_out_of_bounds_is_refused(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = BOUNDS[case]
    refused([*FIT, *flags], message, folder, capsys)


OF_OTHERS: dict[str, tuple[list[str], str]] = {
    "test by a seed": (["test", *SMALL, "--seed_everything", "-1"], "seed_everything must lie in"),
    "test on devices": (["test", *SMALL, "--trainer.devices", "x"], CPU.format("'x'")),
    "test on nodes": (["test", *SMALL, "--trainer.num_nodes", "0"], "`num_nodes` must be a positive integer"),
    "sweep by a seed": (["sweep", "--output", "s", "--seeds", "[-1]"], "seeds must lie in 0.*got -1"),
    "sweep of one model's seed": (
        ["sweep", "--output", "s", "--fit", "{model: {init_args: {seed: 5}}}"], "model.seed 5 .*; give seeds",
    ),
    "sweep on an accelerator": (
        ["sweep", "--output", "s", "--fit", "{trainer: {accelerator: nope}}"], "invalid accelerator name",
    ),
    "an empty recipe": (["sweep", "--config", "empty.yaml"], "'empty.yaml' holds nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_OTHERS)
def test_other_commands_refuse_it_too(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = OF_OTHERS[case]
    refused(argv, message, folder, capsys)


def test_configurations_with_one_seed_load(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--config", "seeds.yaml", "--seed_everything", "9"]) == 0
    written = folder / "run" / "parts" / "textures" / "config.yaml"
    assert "seed_everything: 9" in written.read_text()
    again = ["fit", "--config", str(written), "--trainer.default_root_dir", "again", "--dry_run", "--model.seed", "9"]
    assert main([*again, "--trainer.max_steps", "-1", "--trainer.max_epochs", "1"]) == 2
    assert "train_only needs --trainer.max_steps" in capsys.readouterr().err  # neither the seed, nor -1
    assert main([*again, "--data.seed", "9"]) == 0
    config = SweepRecipe("s", fit="seeds.yaml", seeds=[1]).fit_config("lora", 1, Path("root"))
    assert (config["seed_everything"], config["model"]["init_args"]["seed"]) == (1, 1)


SLURM = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "2"}
LAUNCHED: dict[str, tuple[dict[str, str], str]] = {
    "an allocation": (SLURM, "--ntasks=2.*start it by srun, or for one process unset SLURM_NTASKS"),
    "tasks by a word": (SLURM | {"SLURM_NTASKS": "x"}, "invalid literal|SLURM_NTASKS must be a number"),
    "restarts by a word": ({"SLURM_RESTART_COUNT": "x"}, "SLURM_RESTART_COUNT must be a number of at least 0, got 'x'"),
}


@pytest.mark.parametrize("case", LAUNCHED)
def test_a_launcher_that_contradicts_itself(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment, message = LAUNCHED[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused([*FIT, "--overwrite"], message, folder, capsys)


def test_restarts_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_restarted()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert is_restarted()


def test_faults_of_our_own_stay_faults() -> None:
    with pytest.raises(TypeError, match="ours"), trainer_built(Namespace(devices=1, accelerator="cpu")):
        raise TypeError("ours")


# images and reports


def test_an_image_that_is_none_is_named_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.png").write_text("no image")
    assert main(["predict", *SMALL, "--data.images", "bad.png", "--output", "out.csv"]) == 2
    stderr = capsys.readouterr().err
    assert "bad.png (no image, or of a format that is not known); mend them" in stderr
    assert not (folder / "out.csv").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("runs/x", "that is one of the runs"),
        ("runs/x/fused", "lies within the run '.*/runs/x'"),
        ("runs/y", "lies within the run '.*/runs/y'"),
        ("runs/y/parts/a", "lies within the run '.*/runs/y'"),
        ("runs/y/report", "'runs/x' has neither results.json nor sweep.json"),
        ("swept/ledger/points", "lies within the sweep '.*/swept'"),
        ("swept/report", "'runs/x' has neither results.json nor sweep.json"),
    ],
)
def test_a_report_keeps_out_of_runs(
    output: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in ("x", "y"):
        (folder / "runs" / run).mkdir(parents=True)
    (folder / "runs" / "y" / "config.yaml").touch()
    (folder / "runs" / "y" / "checkpoints").mkdir()
    (folder / "config.yaml").touch()  # of the user
    (folder / "swept" / "ledger" / "inputs").mkdir(parents=True)
    refused(["report", "runs/x", "--output", output], message, folder, capsys)


def test_the_help_says_who_writes_an_output(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["validate", "--help"])
    assert "(predict) or the rows (validate, test)" in " ".join(capsys.readouterr().out.split())


# Ctrl-C


def interrupt(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)


@pytest.mark.parametrize("argv", [["test", *SMALL], ["validate", *SMALL], ["report", "x"]])
def test_an_interrupted_command_says_so(
    argv: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fusionlab.ClipModule, "score", interrupt)
    monkeypatch.setattr("fusionlab.commands.report.parse", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    assert main(argv) == 130
    assert capsys.readouterr().err == (
        "fusionlab: stopped by SIGINT; the same command begins again, a fit or a sweep where it was\n"
    )
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list(folder.glob("run/*.json"))


def test_other_exits_of_lightning_stay_as_they_are() -> None:
    with pytest.raises(SystemExit, match="143"), lightning_errors():
        raise SystemExit(143)


def test_an_interrupted_fit_keeps_its_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = fusionlab.ClipModule.loss

    def interrupted(self: Any, *arguments: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return loss(self, *arguments)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(fusionlab.ClipModule, "loss", interrupted)
        with pytest.raises(SystemExit, match="130"):
            main(FIT)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "stopped by SIGINT; step 1 is saved; the same command goes on from there" in capsys.readouterr().err
    path = folder / "run" / "parts" / "textures" / "checkpoints" / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 1
    assert main(FIT) == 0
    assert torch.load(path, weights_only=True)["global_step"] == 2


def test_a_second_interrupt_ends_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    stopping = StopOnSignal(None)
    stopping._training = True
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # the second one handed on by a launcher
        stopping._handle(number, None)
    stopping.same_within_seconds = 0
    with pytest.raises(SystemExit, match="130"):
        stopping._handle(signal.SIGINT, None)
    assert "stopped by SIGINT; at once" in capsys.readouterr().err


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it starts in the background
    stopping = StopOnSignal(None)
    stopping.install()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == stopping._handle
    stopping.restore()
    signal.signal(signal.SIGINT, before)


def test_a_command_is_interrupted_while_it_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fusionlab", "fuse", "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    read = ""
    while "jsonargparse" not in read:  # the command is at work
        read = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode in (130, -signal.SIGINT)  # the latter where Python was within code that is text
    assert "Traceback" not in told
    assert "fusionlab: stopped by SIGINT" in told
