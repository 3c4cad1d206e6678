"""Options that bound a run: what is scored says so, what is tried leaves nothing, what is repeated is the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from often import often

import fusionlab
from fusionlab.__main__ import main
from fusionlab.commands.flags import take_whole_numbers_first

TASKS = ["textures", "shapes"]
DATA = ["--data.tasks", json.dumps(TASKS), "--data.max_samples", "14", "--data.eval_batch_size", "4"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
FIT = ["fit", *DATA, *QUIET, "--data.batch_size", "4", "--model.rank", "2", "--model.learning_rate", "0.01"]
FIT += ["--trainer.max_steps", "3", "--fusion.rules", "[average, task_arithmetic]"]
QUIET_TRAINER: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False,
}  # fmt: skip


class KilledError(Exception):
    """Stands for what kills a process."""


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


def content(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def data() -> fusionlab.ImageTasks:
    found = fusionlab.ImageTasks(TASKS, max_samples=14, eval_batch_size=4, image_size=32)
    found.setup()
    return found


# what is given, and how many of the 14 samples in batches of 4 are scored
LIMITS = [(1, 4), (2, 8), (3, 12), (4, 14), (99, 14), (0.25, 4), (0.5, 8), (0.99, 12), (1.0, 14), (0.01, 4)]


@pytest.mark.parametrize(("limit", "expected"), LIMITS)
@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_first_batches_are_scored_on_any_number_of_processes(
    data: fusionlab.ImageTasks, split: str, limit: float, expected: int
) -> None:
    option = {"test": "limit_test_batches", "validation": "limit_val_batches"}[split]
    data.trainer = Trainer(**QUIET_TRAINER, **{option: limit})
    for world_size in (1, 2, 3):
        batches = [
            b
            for rank in range(world_size)
            for b in data.eval_batches("shapes", split, rank=rank, world_size=world_size)
        ]
        seen = sorted(index for batch in batches for index in batch["index"][batch["mask"]].tolist())
        assert seen == list(range(expected))
        assert {len(batch["mask"]) for batch in batches} == {4}
    assert data.num_eval_batches("shapes", split) == len(list(data.eval_batches("shapes", split)))
    whole, scored = data.loaded["shapes"][split], data.splits["shapes"][split]
    assert (len(scored), scored.data_version == whole.data_version) == (expected, expected == 14)
    other = {"test": "validation", "validation": "test"}[split]
    assert [len(data.splits["shapes"][name]) for name in ("train", other)] == [14, 14]


def test_loaders_leave_the_trainer_one_batch(data: fusionlab.ImageTasks) -> None:
    for limit in (1, 7, 1.0, *(1 / n for n in range(2, 40)), 0.3, 0.07, 0.001):
        data.trainer = Trainer(**QUIET_TRAINER, limit_test_batches=limit)
        loader = data.test_dataloader()
        assert (min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)) == 1


# options of a command, and the samples that its rows are of, or None for all
SCORED: dict[str, tuple[str, list[str], int | None]] = {
    "validate": ("validate", [], None),
    "validate, two batches": ("validate", ["--trainer.limit_val_batches", "2"], 8),
    "validate, a half": ("validate", ["--trainer.limit_val_batches", "0.5"], 8),
    "test": ("test", [], None),
    "test, one batch": ("test", ["--trainer.limit_test_batches", "1"], 4),
    "test, a third": ("test", ["--trainer.limit_test_batches", "0.34"], 4),
}


@pytest.mark.parametrize("case", SCORED)
def test_rows_are_of_what_is_scored_and_say_so(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, flags, expected = SCORED[case]
    assert main([command, *DATA, *QUIET, *flags, "--output", str(tmp_path / "rows.json")]) == 0
    rows, printed = rows_of(tmp_path / "rows.json"), capsys.readouterr().out
    assert {row["task"] for row in rows} == set(TASKS)
    split = {"validate": "validation", "test": "test"}[command]
    assert {(row["split"], row["num_samples"]) for row in rows} == {(split, expected or 14)}
    counts = [row["value"] * row["num_samples"] for row in rows]
    assert counts == pytest.approx([round(count) for count in counts])
    said = f"{flags[0].removeprefix('--trainer.')} {flags[1]}: the first {expected} of 14 samples" if flags else None
    assert {row.get("limited") for row in rows} == {said}
    assert ("of a part of the samples" in printed) == bool(flags)


def test_a_bounded_run_says_what_bounds_it(tmp_path: Path) -> None:
    root = tmp_path / "run"
    limits = ["--trainer.limit_test_batches", "2", "--trainer.limit_val_batches", "0.5"]
    assert main([*FIT, *limits, "--trainer.default_root_dir", str(root)]) == 0
    rows = rows_of(root / "results.json")
    assert {row["num_samples"] for row in rows} == {8}
    assert all(row["limited"].startswith("limit_test_batches 2: the first 8 of 14") for row in rows)
    chosen = {row["rule"] for row in rows if "coefficient is chosen on a part of validation" in row["limited"]}
    assert chosen == {"task_arithmetic"}
    assert "Scores of a part of the samples" in (root / "results.md").read_text()
    assert main(["report", str(root), "--output", str(tmp_path / "report")]) == 0
    assert any("limit_test_batches 2" in path.read_text() for path in (tmp_path / "report").rglob("*.md"))


REFUSED = [
    ("validate", ["--trainer.limit_val_batches", "0"], "limit_val_batches 0 leaves nothing to score"),
    ("test", ["--trainer.limit_test_batches", "0"], "limit_test_batches 0 leaves nothing to score"),
    ("test", ["--trainer.limit_val_batches", "1"], "--trainer.limit_val_batches does nothing in test"),
    ("fit", ["--trainer.limit_test_batches", "0"], "limit_test_batches 0 leaves nothing to score"),
    ("fit", ["--trainer.limit_train_batches", "0"], "limit_train_batches 0 leaves nothing to train on"),
    ("fit", ["--trainer.limit_train_batches", "0.01"], "Please increase the `limit_train_batches` argument"),
    ("fit", ["--trainer.limit_test_batches", "1.5"], "limit_test_batches"),
    ("fit", ["--trainer.fast_dev_run", "-1"], "fast_dev_run"),
    ("fit", ["--trainer.overfit_batches", "-1"], "overfit_batches"),
]


@pytest.mark.parametrize(("command", "flags", "message"), REFUSED)
def test_what_leaves_nothing_is_refused(
    command: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = FIT if command == "fit" else [command, *DATA, *QUIET]
    assert main([*argv, *flags, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unfinished") / "run"
    original = fusionlab.ClipModule.loss

    def loss(self: fusionlab.ClipModule, task: str, batch: dict[str, Any]) -> torch.Tensor:
        if self.global_step == 2:
            raise KilledError
        return original(self, task, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusionlab.ClipModule, "loss", loss)
        with pytest.raises(KilledError):
            main([*FIT, "--checkpoint_every_n_steps", "1", "--trainer.default_root_dir", str(root)])
    assert (root / "checkpoints" / "last.ckpt").exists()
    return root


TRIALS: dict[str, list[str]] = {
    "one batch": ["--trainer.fast_dev_run", "true"],
    "two batches": ["--trainer.fast_dev_run", "2"],
    "with overwrite": ["--trainer.fast_dev_run", "1", "--overwrite"],
    "of a part": ["--trainer.fast_dev_run", "1", "--train_only"],
    "of another configuration": ["--trainer.fast_dev_run", "1", "--model.method", "l_lora"],
    "with a validated choice": ["--trainer.fast_dev_run", "1", "--trainer.overfit_batches", "1"],
}


@pytest.mark.parametrize("case", often(TRIALS, "with overwrite", "with a validated choice"))
def test_a_trial_is_bounded_and_leaves_a_run_as_it_is(
    case: str, unfinished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, batches, steps = content(unfinished), [], []
    scored, original = fusionlab.ClipModule.score, fusionlab.ClipModule.loss

    def score(self: fusionlab.ClipModule, task: str, batch: dict[str, Any], metrics: Any) -> None:
        batches.append(max(batch["index"].tolist()))
        scored(self, task, batch, metrics)

    def loss(self: fusionlab.ClipModule, task: str, batch: dict[str, Any]) -> torch.Tensor:
        steps.append(self.global_step)
        return original(self, task, batch)

    monkeypatch.setattr(fusionlab.ClipModule, "score", score)
    monkeypatch.setattr(fusionlab.ClipModule, "loss", loss)
    assert main([*FIT, *TRIALS[case], "--trainer.default_root_dir", str(unfinished)]) == 0
    assert content(unfinished) == before
    count = 2 if case == "two batches" else 1
    assert sorted(set(steps)) == list(range(count))
    assert max(batches, default=0) < count * 4
    if case != "of a part":
        printed = capsys.readouterr().out
        option = "overfit_batches 1" if "choice" in case else f"fast_dev_run {count}"
        assert f"{option}: the first {count * 4} of 14 samples" in printed
        assert "nothing is kept" in printed


def test_a_trial_from_python_writes_nothing(data: fusionlab.ImageTasks, tmp_path: Path) -> None:
    callbacks = [fusionlab.FusionCallback(["average"])]
    options = QUIET_TRAINER | {"callbacks": callbacks, "default_root_dir": tmp_path / "run"}
    trainer = Trainer(**options, fast_dev_run=1)
    trainer.fit(fusionlab.ClipModule("tiny-clip", rank=2), fusionlab.ImageTasks(TASKS, max_samples=14))
    assert not (tmp_path / "run").exists()


class Watched(fusionlab.ClipModule):
    """Notes the samples of each batch."""

    def __init__(self) -> None:
        super().__init__("tiny-clip", rank=2)
        self.seen: list[list[int]] = []

    def loss(self, task: str, batch: dict[str, Any]) -> torch.Tensor:
        if task == "shapes":
            self.seen.append(batch["index"].tolist())
        return super().loss(task, batch)


# the option, options beside it, and how many different batches are trained on
REPEATED: dict[str, tuple[dict[str, Any], int]] = {
    "one batch": ({"overfit_batches": 1}, 1),
    "two batches": ({"overfit_batches": 2}, 2),
    "a half": ({"overfit_batches": 0.5}, 2),
    "more than there are": ({"overfit_batches": 9}, 4),
    "accumulated": ({"overfit_batches": 2, "accumulate_grad_batches": 2}, 2),
    "none": ({}, 8),
}


@pytest.mark.parametrize("case", often(REPEATED, "a half", "accumulated"))
def test_the_same_batches_are_trained_on_again(case: str) -> None:
    options, expected = REPEATED[case]
    module = Watched()
    options = {"limit_val_batches": 0, "num_sanity_val_steps": 0, **options}
    trainer = Trainer(**QUIET_TRAINER, **options, max_epochs=2 if case == "none" else 4)
    trainer.fit(module, fusionlab.ImageTasks(TASKS, max_samples=14, batch_size=4))
    epochs = len(module.seen) // expected
    assert len({tuple(batch) for batch in module.seen}) == expected
    assert case == "none" or module.seen == module.seen[:expected] * epochs


def test_one_batch_is_one_whatever_order_a_library_gave_the_union() -> None:
    parser = LightningArgumentParser()
    parser.add_argument("--limit", type=float | int | None)
    assert type(parser.parse_args(["--limit", "1"]).limit) is float
    take_whole_numbers_first(parser)
    assert type(parser.parse_args(["--limit", "1"]).limit) is int
    assert type(parser.parse_args(["--limit", "1.0"]).limit) is float
