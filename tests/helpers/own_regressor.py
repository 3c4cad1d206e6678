"""A module and data of another package: a regressor on three tasks, of which fusionlab knows its contracts only."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError, MetricCollection

import fusionlab
from fusionlab.contracts import DataDefaults, ModuleDefaults, Network

DIM = 4


class Regressor(LightningModule, ModuleDefaults):
    """Two layers, with a copy for each task.

    Args:
        width: values between the layers.
        learning_rate: of Adam.
        weights: folder of fine-tuned or fused weights to score.
    """

    def __init__(self, width: int = 8, learning_rate: float = 0.02, weights: str | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(DIM, width), nn.Tanh(), nn.Linear(width, 1)).requires_grad_(False)
        self.backbone = Network("regressor", self.network, {"width": width})
        self.copies = nn.ModuleDict()
        self.task_parameters: dict[str, list[nn.Parameter]] = {}
        self.learning_rate, self.weights = learning_rate, weights

    def setup(self, stage: str) -> None:
        if stage == "fit" and not self.copies:
            self.add_adapters(list(self.trainer.datamodule.tasks))

    def add_adapters(self, tasks: list[str]) -> None:
        for task in tasks:
            self.copies[task] = deepcopy(self.network).requires_grad_(True)
            self.task_parameters[task] = list(self.copies[task].parameters())

    def activate(self, task: str | None) -> None:
        self.active = task

    def finetuned(self, task: str) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.copies[task].named_parameters()}

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.network if self.active is None else self.copies[self.active])(inputs)[:, 0]

    def loss(self, task: str, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(self(batch["inputs"]), batch["targets"])

    def metrics(self, task: str) -> MetricCollection:
        return MetricCollection({"squared_error": MeanSquaredError()}).to(self.device)

    def score(self, task: str, batch: dict[str, Tensor], metrics: MetricCollection) -> None:
        kept = batch["mask"]
        metrics.update(self(batch["inputs"])[kept], batch["targets"][kept])

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        losses = []
        for task, part in batch.items():
            with self.use(task):
                losses.append(self.loss(task, part))
        return torch.stack(losses).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.copies.parameters(), self.learning_rate)

    def validation_step(self, batch: int, batch_idx: int) -> None:
        self._score("validation")

    def test_step(self, batch: int, batch_idx: int) -> None:
        self._score("test")

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[dict[str, float]]:
        return [{"value": round(float(value), 4)} for value in self(batch)]

    def _score(self, split: str) -> None:
        given = None if self.weights is None else fusionlab.load(Path(self.weights))
        labels = {"model": "pretrained"} if given is None else given.labels
        with self.use(None if given is None else given.weights):
            self.rows = fusionlab.evaluate(self, self.trainer.datamodule, None, split, **{"seed": self.seed, **labels})


class Samples:
    """A split: inputs ``(samples, 4)`` and targets ``(samples,)``, float32."""

    evaluation_order = None

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets
        values = torch.cat([inputs.flatten(), targets]).numpy().tobytes()
        self.data_version = self.reading_version = hashlib.sha256(values).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {"inputs": self.inputs[indices], "targets": self.targets[indices], "index": indices}


class Planes(LightningDataModule, DataDefaults):
    """Each task asks for another linear function of the inputs.

    Args:
        batch_size: samples of each task in a batch.
        eval_batch_size: samples in an evaluation batch.
    """

    def __init__(self, batch_size: int = 8, eval_batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        generator = torch.Generator().manual_seed(1)
        self.tasks = {f"plane {number}": torch.randn(DIM, generator=generator) for number in range(3)}
        self.splits = {
            task: {split: self._samples(normal, generator) for split in ("train", "validation", "test")}
            for task, normal in self.tasks.items()
        }

    @staticmethod
    def _samples(normal: Tensor, generator: torch.Generator) -> Samples:
        inputs = torch.randn(40, DIM, generator=generator)
        return Samples(inputs, inputs @ normal)

    def train_dataloader(self) -> DataLoader:
        parts = torch.arange(40).split(self.batch_size)
        batches = [{task: self.splits[task]["train"].batch(part) for task in self.tasks} for part in parts]
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> list[int]:
        return [0]

    def test_dataloader(self) -> list[int]:
        return [0]

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.splits["plane 0"]["test"].inputs, batch_size=self.eval_batch_size)


class Silent(Regressor):
    """Whose predictions are no rows."""

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)
