"""Where nothing can be written is told at the start, in one message on stderr, with exit code 2 and nothing left."""

from __future__ import annotations

import re
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionlab.__main__ import main

TINY = ["--data.tasks", "[digits]", "--data.max_samples", "8", "--trainer.enable_progress_bar", "false"]
FIT = ["fit", *TINY, "--trainer.max_steps", "1", "--fusion.rules", "[average]"]
TEST = ["test", *TINY]
PREDICT = ["predict", "--data.tasks", "[digits]", "--data.images", "INPUTS/images"]
SWEEP = [
    "sweep",
    "--fit.data.init_args.tasks",
    "[digits, signs]",
    "--fit.trainer.max_steps",
    "1",
    "--rules",
    "[average]",
]
ROOT = "--trainer.default_root_dir"
BELOW_A_FILE = r"'\S+/file/below' cannot be written: not a directory"
A_FILE = r"'\S+/file' cannot be written: not a directory"
NO_PLACE = r"'/proc/x' cannot be written: no such file or directory"
EMPTY = r"expected a path, got an empty text"
A_FOLDER = r"is a folder; give a file's name"
PROFILE = "lightning.pytorch.profilers.SimpleProfiler"
CSV, KEEP = "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.callbacks.ModelCheckpoint"

CASES: dict[str, tuple[list[str], str]] = {
    "fit into a file": ([*FIT, ROOT, "INPUTS/file"], rf"trainer\.default_root_dir: {A_FILE}; give a folder"),
    "fit below a file": ([*FIT, ROOT, "INPUTS/file/below"], BELOW_A_FILE),
    "fit where no folder can be made": ([*FIT, ROOT, "/proc/x"], NO_PLACE),
    "fit into a folder without name": ([*FIT, ROOT, ""], rf"trainer\.default_root_dir: {EMPTY}"),
    "a dry run of it": ([*FIT, ROOT, "INPUTS/file", "--dry_run"], A_FILE),
    "one part of a run": ([*FIT, ROOT, "/proc/x", "--train_only"], NO_PLACE),
    "a logger's file": (
        [*FIT, "--trainer.logger", f"{{class_path: {CSV}, init_args: {{save_dir: INPUTS/file}}}}"],
        rf"trainer: CSVLogger: {A_FILE}",
    ),
    "checkpoints of one's own": (
        [*FIT, "--trainer.callbacks", f"[{{class_path: {KEEP}, init_args: {{dirpath: /proc/x}}}}]"],
        rf"trainer: ModelCheckpoint: {NO_PLACE}",
    ),
    "a profile": (
        [*FIT, "--trainer.profiler", f"{{class_path: {PROFILE}, init_args: {{dirpath: INPUTS/file, filename: x}}}}"],
        rf"trainer: SimpleProfiler: {A_FILE}",
    ),
    "test into this folder": ([*TEST, "--output", "."], rf"output: '\.' {A_FOLDER}"),
    "test into a folder": ([*TEST, "--output", "INPUTS/images"], A_FOLDER),
    "test below a file": ([*TEST, "--output", "INPUTS/file/below"], rf"output: {BELOW_A_FILE}; give a file that"),
    "test where no file can be made": ([*TEST, "--output", "/proc/x"], NO_PLACE),
    "test into a device": ([*TEST, "--output", "/dev/null"], r"'/dev/null' is no plain file"),
    "test into nothing": ([*TEST, "--output", ""], rf"output: {EMPTY}"),
    "test into a run folder that is a file": ([*TEST, ROOT, "INPUTS/file"], A_FILE),
    "validate into a name that is too long": (["validate", *TINY, "--output", "x" * 250], r"file name too long"),
    "predict into nothing": ([*PREDICT, "--output", ""], rf"output: {EMPTY}"),
    "predict into a folder": ([*PREDICT, "--output", "INPUTS/images"], A_FOLDER),
    "predict below a file": ([*PREDICT, "--output", "INPUTS/file/below"], BELOW_A_FILE),
    "sweep into a file": ([*SWEEP, "--output", "INPUTS/file"], rf"output: {A_FILE}; give a folder"),
    "sweep where no folder can be made": ([*SWEEP, "--output", "/proc/x", "--dry_run"], NO_PLACE),
    "sweep into nothing": ([*SWEEP, "--output", "", "--dry_run"], rf"output: {EMPTY}"),
}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder, here = tmp_path / "inputs", tmp_path / "here"
    (folder / "images").mkdir(parents=True)
    (folder / "file").write_text("kept")
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FUSIONLAB_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_told_at_the_start(
    case: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    argv, message = CASES[case]
    monkeypatch.setattr("lightning.pytorch.Trainer._run", None)  # who comes so far fails
    before = sorted(inputs.rglob("*"))
    code = main([argument.replace("INPUTS", str(inputs)) for argument in argv])
    stderr = capfd.readouterr().err
    assert code == 2, stderr
    assert stderr.startswith("fusionlab: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert re.search(message, stderr), stderr
    assert sorted(inputs.rglob("*")) == before
    assert (inputs / "file").read_text() == "kept"
    assert list(Path().iterdir()) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of 100 kB at most, as on a disk that is about full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_fills_while_a_checkpoint_is_saved(inputs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = main([*FIT, "--model.rank", "64", ROOT, "run"])
    stderr = capfd.readouterr().err
    assert (code, "Traceback" in stderr) == (2, False), stderr
    assert re.search(r"^fusionlab: '\S*last\.ckpt' cannot be written: file too large\.$", stderr, re.MULTILINE), stderr
    assert [path for path in Path("run").rglob("*") if path.is_file()] == []


def test_a_home_is_expanded(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    assert main([*TEST, "--output", "~/below/scores.json"]) == 0
    assert [path.name for path in (tmp_path / "home" / "below").iterdir()] == ["scores.json"]
    assert list(Path().iterdir()) == []
