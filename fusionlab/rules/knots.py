"""KnOTS: bring the task matrices into one basis before TIES, made for low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionlab.rules.base import Granularity, Statistics, StatisticsScope, TaskVectors
from fusionlab.rules.checks import check_range
from fusionlab.rules.disjoint_mean import disjoint_mean, votes
from fusionlab.rules.matrices import mean

_SMALLEST = 1e-5


@dataclass(frozen=True)
class Knots:
    """θ₀ + λ U · TIES(Σ V₁ᵀ, ..., Σ V_Tᵀ) per matrix, with U Σ [V₁ᵀ ... V_Tᵀ] the decomposition of [τ₁ ... τ_T].

    Singular values up to 1e-5 are left out; TIES trims and elects over each matrix. Tensors that are not matrices get
    λ times the mean task vector. In float64.

    Args:
        density: the share of entries of each right block to keep.
        scaling_coefficient: λ.

    Raises:
        InputError: a density outside 0..1.

    Source: Model merging with SVD to tie the knots, arXiv 2410.19735, section 4.
    """

    density: float = 0.2
    scaling_coefficient: float = 0.6

    granularity: ClassVar[Granularity] = "tensor"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = ()
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("knots.density", self.density, 0.0, 1.0)

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Nothing is measured."""
        return {}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + λ U · TIES of the right blocks."""
        update = self._fused_matrix(task_vectors).to(base.dtype) if base.dim() == 2 else mean(task_vectors)
        return update.mul_(self.scaling_coefficient).add_(base)

    def _fused_matrix(self, task_vectors: TaskVectors) -> Tensor:
        num_tasks, columns = len(task_vectors), task_vectors.stacked.shape[-1]
        side_by_side = torch.cat(list(task_vectors.stacked.double()), dim=1)
        left, sigma, right = torch.linalg.svd(side_by_side, full_matrices=False)
        rank = int((sigma > _SMALLEST).sum())
        blocks = (sigma[:rank, None] * right[:rank]).view(rank, num_tasks, columns).transpose(0, 1)
        trimmed = torch.stack([_trim(block.flatten(), self.density) for block in blocks])
        vote = votes(trimmed, "mass")
        majority = -1.0 if vote.sign().sum() < 0 else 1.0
        return left[:, :rank] @ disjoint_mean(trimmed, vote, majority, [1.0] * num_tasks).view(rank, columns)


def _trim(values: Tensor, density: float) -> Tensor:
    """``values`` with all but its largest entries set to zero: those at least as large as the k-th smallest."""
    k = values.numel() - int(density * values.numel())
    if k == 0 or not values.numel():
        return values
    return values * (values.abs() >= values.abs().kthvalue(k).values)
