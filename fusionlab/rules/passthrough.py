"""One model as it is, each tensor times a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError, name_list
from fusionlab.rules.base import Granularity, StatisticsScope, add_scaled


@dataclass(frozen=True)
class Passthrough:
    """s (θ₀ + τ), the weights of one model times s.

    As the layers of a model that was made deeper are damped, with an s that differs between tensors.

    Args:
        scale: s.

    Raises:
        InputError: when fusing: not one model.

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
        if len(task_vectors) != 1:
            raise InputError(f"passthrough takes one model, got {len(task_vectors)}: {name_list(task_vectors.tasks)}.")
        return add_scaled(base, task_vectors, {task_vectors.tasks[0]: 1.0}).mul_(self.scale)
