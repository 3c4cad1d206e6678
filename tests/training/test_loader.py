"""The training loader: every task at every step, ranks share a global batch, and a resume goes on where it stopped."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from oracles import training_indices
from torch import Tensor

from fusionlab.data.loader import StepLoader
from fusionlab.samplers import exact_batches


class Numbers:
    """A split whose samples are their own indices."""

    evaluation_order = None

    def __init__(self, size: int, order: Tensor | None = None) -> None:
        self.size, self.evaluation_order, self.data_version = size, order, "numbers"

    def __len__(self) -> int:
        return self.size

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {"index": indices}


SPLITS = {"long": Numbers(21), "short": Numbers(5)}


def seen(loader: StepLoader, steps: int) -> list[dict[str, list[int]]]:
    batches = (loader.batch(step) for step in range(steps))
    return [{task: batch["index"].tolist() for task, batch in tasks.items()} for tasks in batches]


def test_an_epoch_is_as_long_as_the_longest_task_and_the_short_one_goes_on() -> None:
    loader = StepLoader(SPLITS, 4, seed=0)
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    short = torch.cat([batch["short"]["index"] for batch in batches])[:20]
    assert all(sorted(part.tolist()) == list(range(5)) for part in short.split(5))


def test_the_stream_goes_on_over_epochs() -> None:
    loader = StepLoader(SPLITS, 4, seed=0)
    batches = list(loader) + list(loader)
    for step, batch in enumerate(batches):
        assert batch["long"]["index"].tolist() == training_indices(21, 4, step, seed=0, task="long").tolist()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_take_the_slices_of_one_global_batch(world_size: int) -> None:
    ranks = [StepLoader(SPLITS, 2, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    alone = StepLoader(SPLITS, 2 * world_size, seed=1)
    assert [len(loader) for loader in ranks] == [len(alone)] * world_size
    for step in range(8):
        parts = [loader.batch(step)["short"]["index"] for loader in ranks]
        assert torch.cat(parts).equal(alone.batch(step)["short"]["index"])


def test_an_iterator_that_is_made_and_not_used_skips_nothing() -> None:
    loader = StepLoader(SPLITS, 4, seed=0)
    iter(loader)
    assert next(iter(loader))["long"]["index"].equal(loader.batch(0)["long"]["index"])


def test_a_loaded_state_goes_on_at_the_next_batch() -> None:
    first, second = StepLoader(SPLITS, 4, seed=0), StepLoader(SPLITS, 4, seed=0)
    batches = iter(first)
    for _ in range(8 - len(first) + 2):
        next(batches)
    second.load_state_dict(first.state_dict())
    assert next(iter(second))["long"]["index"].equal(next(batches)["long"]["index"])


def test_evaluation_batches_follow_the_split_s_own_order() -> None:
    order = torch.tensor([3, 1, 4, 0, 2])
    batches = list(exact_batches(Numbers(5, order), 2))
    assert [batch["index"].tolist() for batch in batches] == [[3, 1], [4, 0], [2, 3]]
    assert [batch["mask"].tolist() for batch in batches] == [[True, True], [True, True], [True, False]]


class Data(LightningDataModule):
    def train_dataloader(self) -> StepLoader:
        return StepLoader(SPLITS, 4, seed=7)


class Recorder(LightningModule):
    """Records what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.record: list[list[int]] = []

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        self.record.append(batch["long"]["index"].tolist())
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def train(folder: Path, *callbacks: Callback, ckpt_path: Path | None = None, **options) -> list[list[int]]:
    module = Recorder()
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, Data(), ckpt_path=ckpt_path, weights_only=True)
    return module.record


@pytest.mark.parametrize("limit", [None, 4], ids=["whole_epochs", "limited_epochs"])
@pytest.mark.parametrize("stopped_at", [3, 4, 6, 8, 10])
def test_lightning_resumes_at_the_next_batch(tmp_path: Path, stopped_at: int, limit: int | None) -> None:
    options = {"max_epochs": 3, "limit_train_batches": limit}
    path = tmp_path / "stopped.ckpt"
    whole = train(tmp_path, SaveAt(stopped_at, path), **options)
    assert len(whole) == 3 * (limit or 6)
    assert train(tmp_path, ckpt_path=path, **options) == whole[stopped_at:]
