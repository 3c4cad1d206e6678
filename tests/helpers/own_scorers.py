"""Modules and data of another package that score in ways of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from own_regressor import Planes, Regressor
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanMetric, MeanSquaredError, Metric, MetricCollection

from fusionlab.samplers import exact_batches


class Bias(Metric):
    """Σ prediction / n, called better where it is higher, which says nothing of errors."""

    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        self.total += predictions.sum()
        self.count += len(predictions)

    def compute(self) -> Tensor:
        return self.total / self.count


class Several(Regressor):
    """Squared error, said first, and a bias; torchmetrics sorts the names of a mapping."""

    def metrics(self, task: str) -> MetricCollection:
        return MetricCollection({"squared_error": MeanSquaredError(), "a_bias": Bias()}).to(self.device)

    def score(self, task: str, batch: dict[str, Tensor], metrics: MetricCollection) -> None:
        kept = batch["mask"]
        metrics.update(self(batch["inputs"])[kept].contiguous(), batch["targets"][kept].contiguous())


class Said(Several):
    """Which says which one counts."""

    def primary_metric(self, task: str) -> str:
        return "squared_error"


class Listed(Several):
    """A list keeps its order, which is here that of the names by chance."""

    def metrics(self, task: str) -> MetricCollection:
        return MetricCollection([MeanAbsoluteError(), MeanSquaredError()]).to(self.device)


class Misnamed(Several):
    """Which names a metric that it has not."""

    def primary_metric(self, task: str) -> str:
        return "squared_eror"


class Undirected(Regressor):
    """torchmetrics' MeanMetric does not say what is better."""

    def metrics(self, task: str) -> MetricCollection:
        return MetricCollection({"loss": MeanMetric()}).to(self.device)

    def score(self, task: str, batch: dict[str, Tensor], metrics: MetricCollection) -> None:
        kept = batch["mask"]
        metrics.update((self(batch["inputs"])[kept] - batch["targets"][kept]).abs())


class Silent(Regressor):
    """Which scores, and keeps no rows."""

    def test_step(self, batch: int, batch_idx: int) -> None:
        with self.use(None):
            samples = self.trainer.datamodule.splits["plane 0"]["test"]
            self.seen = float(self.loss("plane 0", samples.batch(torch.arange(2))))

    validation_step = test_step


class Narrow(Regressor):
    """A base in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.network.bfloat16()

    def forward(self, inputs: Tensor) -> Tensor:
        network: Any = self.network if self.active is None else self.copies[self.active]
        return network(inputs.to(torch.bfloat16))[:, 0].float()


class OwnBatches(Planes):
    """Data that make their evaluation batches themselves."""

    def eval_batches(self, task: str, split: str, *, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Tensor]]:
        return exact_batches(self.splits[task][split], 7, rank=rank, world_size=world_size)
