"""The weighted average of the task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError
from fusionlab.rules.base import Granularity, StatisticsScope, add_scaled
from fusionlab.rules.checks import by_task


@dataclass(frozen=True)
class Average:
    """θ₀ + Σ w_t τ_t / Σ w_t; without weights the plain average of the fine-tuned models.

    Args:
        weights: w_t of every task; only their ratios matter.

    Raises:
        InputError: the weights sum to zero, or (when fusing) they are not those of the tasks.

    Example:
        >>> Average(weights={"a": 1.0, "b": 3.0}).coefficients("w", ("a", "b"), Statistics())
        {'a': 0.25, 'b': 0.75}
    """

    weights: Mapping[str, float] | None = None

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = ()
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.weights is not None and sum(self.weights.values()) == 0:
            raise InputError(f"average: the weights {dict(self.weights)} sum to 0; give weights with another sum.")

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Nothing is measured."""
        return {}

    def coefficients(self, name: str, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        """w_t / Σ w_t, the same for every parameter."""
        weights = by_task(1.0 if self.weights is None else self.weights, tasks, "average.weights")
        return {task: weight / sum(weights.values()) for task, weight in weights.items()}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + Σ λ_t τ_t."""
        return add_scaled(base, task_vectors, self.coefficients(name, task_vectors.tasks, statistics))
