"""What image classifiers share, whatever their heads are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection

from fusionlab.backbones import ClipBackbone, TimmBackbone, ViTBackbone
from fusionlab.backbones.choice import lowest_argmax
from fusionlab.evaluation.metrics import Accuracy
from fusionlab.evaluation.predicting import labelled
from fusionlab.linearize import wide
from fusionlab.modules.base import FusionModule
from fusionlab.modules.grouping import PIXELS_AT_ONCE, SideBySide, filled


class ImageClassifier(FusionModule):
    """Classes of images by logits; subclasses supply the heads and keep ``class_names`` by task.

    Heads act in float32 whatever the network computes in: an update far smaller than the features would be rounded
    away by a product in bfloat16.
    """

    backbone: ClipBackbone | ViTBackbone | TimmBackbone
    reads = "images"
    pads = False
    class_names: dict[str, tuple[str, ...]]

    def features(self, images: Tensor) -> Tensor:
        """Features under the active weights, float32 or wider, shape ``(batch, dim)``."""
        return wide(self.output(lambda: self.backbone.image_features(images)))

    def side_by_side(self, parts: Sequence[Mapping[str, Any]]) -> SideBySide:
        """The images of all tasks as one batch."""
        images = [part["images"] for part in parts]
        sizes = tuple(map(len, images))
        return SideBySide(lambda: self.backbone.image_features(filled(images)), max(sizes, default=0), sizes)

    @property
    def samples_by_default(self) -> int:
        """So many as have 2^17 pixels; on accelerators none, where it is not measured."""
        return PIXELS_AT_ONCE // self.backbone.image_size**2 if self.device.type == "cpu" else 0

    def full_precision(self) -> AbstractContextManager[Any]:
        """Autocast off."""
        return torch.autocast(self.device.type, enabled=False)

    @abstractmethod
    def logits(self, task: str, images: Tensor) -> Tensor:
        """Shape ``(batch, num_classes)``."""

    def loss(self, task: str, batch: dict[str, Any]) -> Tensor:
        """Mean cross-entropy over the batch."""
        return F.cross_entropy(self.logits(task, batch["images"]), batch["labels"])

    def scored_classes(self, task: str, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits and labels."""
        return self.logits(task, batch["images"]), batch["labels"]

    def run_inputs(self, task: str, batch: dict[str, Any]) -> None:
        """The logits of the images."""
        self.logits(task, batch["images"])

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
        return rows
