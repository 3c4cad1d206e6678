"""TSV-M: the leading singular vectors of every task, made orthogonal to those of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionlab.rules.base import Granularity, Statistics, StatisticsScope, TaskVectors
from fusionlab.rules.matrices import mean, polar_factor, singular_triplets


@dataclass(frozen=True)
class TsvM:
    """θ₀ + λ U' Σ V'ᵀ per matrix, from the int(min(m, n)/T) leading singular triplets of each task side by side.

    U' and V' are the polar factors of the concatenated singular vectors. Numerically zero singular values are left
    out. Tensors that are not matrices get λ times the mean task vector. In float64.

    Args:
        scaling_coefficient: λ.

    Source: Task singular vectors, arXiv 2412.00081, algorithm 1.
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
        """θ₀ + λ U' Σ V'ᵀ."""
        update = _fused_matrix(task_vectors).to(base.dtype) if base.dim() == 2 else mean(task_vectors)
        return update.mul_(self.scaling_coefficient).add_(base)


def _fused_matrix(task_vectors: TaskVectors) -> Tensor:
    kept = max(1, min(task_vectors.stacked.shape[1:]) // len(task_vectors))
    lefts, values, rights = [], [], []
    for task_vector in task_vectors.stacked:
        left, sigma, right = singular_triplets(task_vector.double())
        lefts.append(left[:, :kept])
        values.append(sigma[:kept])
        rights.append(right[:kept])
    return (polar_factor(torch.cat(lefts, dim=1)) * torch.cat(values)) @ polar_factor(torch.cat(rights))
