"""LiNeS: task arithmetic whose coefficient grows linearly with depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.rules.base import Granularity, StatisticsScope, add_scaled
from fusionlab.rules.settings import blocks_of


@dataclass(frozen=True)
class Lines:
    """θ₀ + λ_l Σ τ_t with λ_l = α + β·l/(L−1) in block l of L, and α outside the blocks.

    A block is numbered by the first number in a name; each stack of blocks (vision and text, encoder and decoder) is
    counted by itself, over the model, whatever part of it is fused.

    Args:
        beta: β, what the last block has beyond the first; the method searches it.
        alpha: α; 1/T for T tasks by default.

    Source: LiNeS: post-training layer scaling, arXiv 2410.17146, eq. 2.
    """

    beta: float
    alpha: float | None = None

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = ()
    measures_untransformed: ClassVar[bool] = False

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Nothing is measured."""
        return {}

    def coefficients(self, name: str, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        """λ_l, the same for every task."""
        alpha = 1 / len(tasks) if self.alpha is None else self.alpha
        blocks = statistics.once("blocks", lambda: blocks_of(statistics.model or statistics.names or (name,)))
        index, count = blocks.get(name, (0, 1))
        return dict.fromkeys(tasks, alpha + self.beta * (index / max(1, count - 1)))

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + λ_l Σ τ_t."""
        return add_scaled(base, task_vectors, self.coefficients(name, task_vectors.tasks, statistics))
