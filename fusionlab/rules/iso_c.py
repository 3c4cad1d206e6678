"""Iso-C: the sum of the task matrices with all its singular values made equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionlab.rules.base import Granularity, Statistics, StatisticsScope, TaskVectors
from fusionlab.rules.matrices import mean, singular_triplets


@dataclass(frozen=True)
class IsoC:
    """θ₀ + λ σ̄ U Vᵀ per matrix, with U σ Vᵀ the decomposition of Σ τ_t and σ̄ the mean of its singular values.

    Numerically zero singular values are left out, also of the mean. Tensors that are not matrices get λ times the mean
    task vector. In float64.

    Args:
        scaling_coefficient: λ.

    Source: No task left behind: isotropic model merging, arXiv 2502.04959, section 4.
    """

    scaling_coefficient: float = 1.0

    granularity: ClassVar[Granularity] = "tensor"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = ()
    measures_untransformed: ClassVar[bool] = False

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Nothing is measured."""
        return {}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + λ σ̄ U Vᵀ."""
        update = _isotropic_sum(task_vectors).to(base.dtype) if base.dim() == 2 else mean(task_vectors)
        return update.mul_(self.scaling_coefficient).add_(base)


def _isotropic_sum(task_vectors: TaskVectors) -> Tensor:
    total = torch.zeros_like(task_vectors.stacked[0], dtype=torch.float64)
    for task_vector in task_vectors.stacked:
        total += task_vector
    left, sigma, right = singular_triplets(total)
    return (left @ right).mul_(sigma.mean() if sigma.numel() else 0.0)
