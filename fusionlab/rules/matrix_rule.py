"""Rules on whole task matrices in float64."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, TypeGuard

import torch
from torch import Tensor

from fusionlab.blocks.matrices import TaskMatrices
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.rules.base import Granularity, StatisticsScope

Sides = Literal["both", "left", "none"]


class MatrixRule(ABC):
    """A rule on whole matrices ``(out, in)``: θ₀ + λ times what it makes of the task matrices, in float64.

    Tensors that are not matrices get λ times the mean task vector. ``sides`` says in which orthonormal bases of its two
    sides a weight may be handed to the rule: if the rule turns with the bases of ``both``, the ``left``, or ``none``.
    """

    scaling_coefficient: float

    over_adapters: ClassVar[str] = ""  # what differs there, for who compares λ or results
    granularity: ClassVar[Granularity] = "tensor"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = ()
    measures_untransformed: ClassVar[bool] = False

    @property
    def sides(self) -> Sides:
        """In which bases."""
        return "both"

    @abstractmethod
    def fuse_matrices(self, matrices: TaskMatrices) -> Tensor:
        """The update before λ, float64, in the bases of ``matrices``."""

    def flops(self, shape: tuple[int, int]) -> float:
        """Floating-point operations on a weight of this shape, where there are so many that one should be told."""
        return 0.0

    def check_ranks(self, name: str, shape: tuple[int, int], ranks: list[int], joint: int) -> None:  # noqa: B027
        """Raise if the rule cannot work on task matrices of these ranks, whose rows together span ``joint`` dimensions.

        Raises:
            InputError: with the reason.
        """

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Nothing is measured."""
        return {}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + λ times the update."""
        if base.dim() != 2:
            return mean(task_vectors).mul_(self.scaling_coefficient).add_(base)
        is_transposed = name in statistics.transposed
        stacked = task_vectors.stacked.double()
        stacked = stacked.transpose(1, 2).contiguous() if is_transposed else stacked
        shape = (stacked.shape[1], stacked.shape[2])
        matrices = TaskMatrices(task_vectors.tasks, stacked, shape, base.dtype)
        update = self.fuse_matrices(matrices).to(base.dtype)
        update = update.T.contiguous() if is_transposed else update
        statistics.remark(name, matrices.cuts.near)
        return update.mul_(self.scaling_coefficient).add_(base)


def has_core(rule: object) -> TypeGuard[MatrixRule]:
    """Whether ``rule`` can be run on task matrices in other bases, as on the small cores of adapters."""
    return isinstance(rule, MatrixRule) and rule.sides != "none"


def mean(task_vectors: TaskVectors) -> Tensor:
    """Σ τ_t / T, in recipe order: what these rules do with tensors that are not matrices."""
    total = torch.zeros_like(task_vectors.stacked[0])
    for task_vector in task_vectors.stacked:
        total += task_vector
    return total.div_(len(task_vectors))
