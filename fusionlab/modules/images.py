"""What image classifiers share, whatever their heads are."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection

from fusionlab.metrics import Accuracy, lowest_argmax
from fusionlab.modules.base import FusionModule
from fusionlab.predicting import labelled


class ImageClassifier(FusionModule):
    """Classes of images by logits; subclasses supply the heads and keep ``class_names`` by task."""

    class_names: dict[str, tuple[str, ...]]

    @abstractmethod
    def logits(self, task: str, images: Tensor) -> Tensor:
        """Shape ``(batch, num_classes)``."""

    def loss(self, task: str, batch: dict[str, Any]) -> Tensor:
        """Mean cross-entropy over the batch."""
        return F.cross_entropy(self.logits(task, batch["images"]), batch["labels"])

    def scored_classes(self, task: str, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits and labels."""
        return self.logits(task, batch["images"]), batch["labels"]

    def metrics(self, task: str) -> MetricCollection:
        """Top-1 accuracy."""
        return MetricCollection({"accuracy": Accuracy()}).to(self.device)

    def score(self, task: str, batch: dict[str, Any], metrics: MetricCollection) -> None:
        """Count top-1 hits; ties go to the lower label."""
        metrics.update(lowest_argmax(self.logits(task, batch["images"])), batch["labels"], batch["mask"])

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Label a batch of images with every task's classes; ties go to the lower label."""
        rows = []
        for task, class_names in self.class_names.items():
            rows += labelled(self.logits(task, batch["images"]), class_names, task, batch["paths"])
        self.predictions += rows
        return rows
