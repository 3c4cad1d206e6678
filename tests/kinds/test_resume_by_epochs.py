"""A run bounded by epochs that is cut short and given again trains on what the uninterrupted run trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from often import often

import fusionlab
from fusionlab.__main__ import main
from fusionlab.callbacks import LastCheckpoint

SIZE = {"max_samples": 20, "batch_size": 4}  # an epoch is 5 batches
# what shapes an epoch, and before which batch the run is killed: after the first epoch, after the second, inside one
OPTIONS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "whole epochs": ({}, (5, 10, 7)),
    "short epochs": ({"limit_train_batches": 3}, (3, 6, 5)),
    "half epochs": ({"limit_train_batches": 0.5}, (2, 4, 3)),
    "accumulated": ({"accumulate_grad_batches": 2}, (6, 12, 8)),
    "with validation": ({"limit_val_batches": 1.0}, (5, 10, 7)),
    "validation inside": ({"limit_val_batches": 1.0, "val_check_interval": 2}, (5, 10, 4)),
    "steps over epochs": ({"max_steps": 13, "max_epochs": -1}, (5, 10, 7)),
    "one batch an epoch": ({"limit_train_batches": 1, "max_epochs": 5}, (1, 2, 4)),
    "one batch an epoch, by steps": ({"limit_train_batches": 1, "max_steps": 5, "max_epochs": -1}, (1, 2, 4)),
    "one update an epoch": (
        {"limit_train_batches": 2, "accumulate_grad_batches": 2, "max_steps": 5, "max_epochs": -1},
        (2, 6, 7),
    ),
    "two updates an epoch": (
        {"limit_train_batches": 4, "accumulate_grad_batches": 2, "max_steps": 5, "max_epochs": -1},
        (4, 8, 6),
    ),
}


class KilledError(Exception):
    """Stands for what kills a process."""


class Watched(fusionlab.ClipModule):
    """Notes the samples of each batch, and can be killed before one of them."""

    def __init__(self, killed_before: int | None = None) -> None:
        super().__init__("tiny-clip", rank=2)
        self.killed_before, self.seen = killed_before, {}

    def loss(self, task: str, batch: dict[str, Any]) -> torch.Tensor:
        if self._batches_before == self.killed_before:
            raise KilledError
        self.seen[self._batches_before] = batch["index"].tolist()
        return super().loss(task, batch)


@pytest.fixture(scope="module")
def data() -> fusionlab.ImageTasks:
    return fusionlab.ImageTasks(["textures"], eval_batch_size=8, **SIZE)


def train(data: fusionlab.ImageTasks, module: Watched, root: Path, options: dict[str, Any]) -> Watched:
    last = LastCheckpoint(root, every_n_steps=1)
    trainer = Trainer(
        **{"max_epochs": 3, "limit_val_batches": 0, **options}, default_root_dir=root, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=[last],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=last.path if last.path.exists() else None, weights_only=True)
    return module


@pytest.mark.parametrize("options", often(OPTIONS, "accumulated", "validation inside", "one batch an epoch"))
def test_the_data_and_the_adapter_are_those_of_the_uninterrupted_run(
    data: fusionlab.ImageTasks, tmp_path: Path, options: str
) -> None:
    changed, kills = OPTIONS[options]
    whole = train(data, Watched(), tmp_path / "whole", changed)
    assert len({tuple(batch) for batch in whole.seen.values()}) > len(whole.seen) // 2
    for kill in kills:
        killed = Watched(kill)
        with pytest.raises(KilledError):
            train(data, killed, tmp_path / str(kill), changed)
        resumed = train(data, Watched(), tmp_path / str(kill), changed)
        assert killed.seen | resumed.seen == whole.seen
        for ours, theirs in zip(resumed.task_parameters["textures"], whole.task_parameters["textures"], strict=True):
            assert torch.equal(ours, theirs)


def test_the_command_goes_on_after_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [
        "fit", "--data.tasks", "[textures, shapes]", "--data.max_samples", "20", "--data.batch_size", "4",
        "--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--fusion.rules", "[average]",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "whole")]) == 0
    original = fusionlab.ClipModule.loss

    def loss(self: fusionlab.ClipModule, task: str, batch: dict[str, Any]) -> torch.Tensor:
        if self._batches_before == 5:
            raise KilledError
        return original(self, task, batch)

    with monkeypatch.context() as patch:
        patch.setattr(fusionlab.ClipModule, "loss", loss)
        with pytest.raises(KilledError):
            main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")])
    assert main([*argv, "--trainer.default_root_dir", str(tmp_path / "run")]) == 0
    for name in ("results.json", "adapters/textures/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
