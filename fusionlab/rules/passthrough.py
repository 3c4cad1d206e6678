"""The mean of the models, of one model itself, each tensor times a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.rules.base import Granularity, StatisticsScope, add_scaled


@dataclass(frozen=True)
class Passthrough:
    """s (θ₀ + Σ τ_t / T): of one model its own weights, times s.

    For a model that is stacked from ranges of blocks, and to damp its layers by an s that differs between tensors.

    Args:
        scale: s.

    Source: mergekit's merge method passthrough.
    """

    scale: float = 1.0

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = ()
    measures_untransformed: ClassVar[bool] = False

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Nothing is measured."""
        return {}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """The scaled weights."""
        shares = dict.fromkeys(task_vectors.tasks, 1 / len(task_vectors))
        return add_scaled(base, task_vectors, shares).mul_(self.scale)
