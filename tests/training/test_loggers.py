"""What Lightning's loggers write of a fit, read back: each task's loss, the rate, and the scores of every model."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusionlab.__main__ import main
from fusionlab.progress import Lines

TASKS, STEPS = ("textures", "shapes"), 4
LOSSES = [f"train/{task}/loss" for task in TASKS]
RATE = "train/learning_rate"
FIT = ["fit", "--data.tasks", "[textures, shapes]", "--data.max_samples", "16", "--data.batch_size", "4",
       "--trainer.max_steps", str(STEPS), "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu",
       "--model.rank", "2", "--model.learning_rate", "0.02", "--fusion.rules", "[average]"]  # fmt: skip
needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed: pip install 'fusionlab[loggers]'"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two loggers at once, where TensorBoard is installed."""
    root = tmp_path_factory.mktemp("run")
    names = ["CSVLogger", *(["TensorBoardLogger"] if importlib.util.find_spec("tensorboard") else [])]
    loggers = [{"class_path": name, "init_args": {"save_dir": str(root / name)}} for name in names]
    assert main([*FIT, "--trainer.logger", json.dumps(loggers), "--trainer.default_root_dir", str(root / "run")]) == 0
    return root


def scores(root: Path) -> dict[str, float]:
    """What the run's own rows say, by the keys of loggers."""
    rows = json.loads((root / "run" / "results.json").read_text())["rows"]
    kept = [row for row in rows if row["finetuned_on"] in (None, row["task"])]
    return {f"test/{row['task']}/{row['metric']}/{row['rule'] or row['model']}": row["value"] for row in kept}


def check(losses: dict[str, list[float]], found: dict[str, float], root: Path) -> None:
    assert all(len(losses[key]) == STEPS and all(map(math.isfinite, losses[key])) for key in LOSSES)
    rates = [0.01 * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)]
    assert losses[RATE] == pytest.approx(rates, rel=1e-5)  # half a cosine down, float32 in the files
    expected = scores(root)
    assert {key.rpartition("/")[2] for key in expected} == {"pretrained", "finetuned", "average"}
    assert len(expected) >= 6
    assert found == pytest.approx(expected, rel=1e-6)


def test_csv(run: Path) -> None:
    with (next((run / "CSVLogger").rglob("metrics.csv"))).open() as file:
        rows = list(csv.DictReader(file))
    losses = {key: [float(row[key]) for row in rows if row.get(key)] for key in (*LOSSES, RATE)}
    check(losses, {key: float(value) for key, value in rows[-1].items() if key.startswith("test/")}, run)
    assert rows[-1]["step"] == str(STEPS)


def test_tensorboard(run: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed: pip install 'fusionlab[loggers]'",
    )
    file = next((run / "TensorBoardLogger").rglob("events.*"))
    events = accumulator.EventAccumulator(str(file)).Reload()
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    check(values, {tag: value[-1] for tag, value in values.items() if tag.startswith("test/")}, run)


@needs_wandb
@pytest.mark.slow
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = {"class_path": "WandbLogger", "init_args": {"save_dir": str(tmp_path), "project": "mine"}}
    argv = [*FIT, "--trainer.logger", json.dumps(logger), "--trainer.default_root_dir", str(tmp_path / "run")]
    assert main(argv) == 0
    importlib.import_module("wandb").finish()  # as the end of the process does
    rows = wandb_rows(next(tmp_path.rglob("*.wandb")))
    losses = {key: [row[key] for row in rows if key in row] for key in (*LOSSES, RATE)}
    found = {key: value for row in rows for key, value in row.items() if key.startswith("test/")}
    check(losses, found, tmp_path)


def wandb_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of the history in W&B's own file of a run without a network."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def records(content: bytes, block: int = 32768, header: int = 7) -> Iterator[bytes]:
    """The records of LevelDB's log format, after the file's own seven bytes; none lies across a block's end whole."""
    place, whole = header, b""
    while place + header <= len(content):
        if block - place % block < header:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # a record that is whole here, or the last part of one
            yield whole
            whole = b""


def test_without_a_terminal_progress_is_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FIT[:9], "--trainer.accelerator", "cpu", "--train_only"]
    assert main([*flags, "--trainer.default_root_dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert f"fine-tuning 2 tasks (lora): step 0 of {STEPS}" in shown.splitlines()
    assert f"fine-tuning 2 tasks (lora): trained, {STEPS} steps" in shown.splitlines()
    assert not set(shown) & {"\r", "\x1b"}


def test_lines_come_now_and_then() -> None:
    said: list[str] = []
    now = iter([0, 20, 31, 50, 95])
    lines = Lines("points", 10, done=2, clock=lambda: float(next(now)), write=said.append)
    for _ in range(4):
        lines.advance(2, "so")
    assert said == ["points: 6 of 10, 60%, 31 s so far, about 31 s left, so",
                    "points: 10 of 10, 100%, 95 s so far, about 0 s left, so"]  # fmt: skip
