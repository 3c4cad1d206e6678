"""KnOTS: bring the task matrices into one basis before TIES, made for low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusionlab.blocks.matrices import TaskMatrices
from fusionlab.rules.checks import check_range
from fusionlab.rules.disjoint_mean import disjoint_mean, votes
from fusionlab.rules.matrix_rule import MatrixRule, Sides

_SMALLEST = 1e-5
_ROUNDING = 1e-12  # of the largest singular value: what is left of zeros


@dataclass(frozen=True)
class Knots(MatrixRule):
    """θ₀ + λ U · TIES(Σ V₁ᵀ, ..., Σ V_Tᵀ) per matrix, with U Σ [V₁ᵀ ... V_Tᵀ] the decomposition of [τ₁ ... τ_T].

    Singular values up to 1e-5 are left out, and entries of the right blocks that are zero to rounding have no vote;
    TIES trims and elects over each matrix. Tensors that are not matrices get λ times the mean task vector. In float64.

    Args:
        density: the share of entries of each right block to keep.
        scaling_coefficient: λ.

    Raises:
        InputError: a density outside 0..1.

    Source: Model merging with SVD to tie the knots, arXiv 2410.19735, section 4.
    """

    density: float = 0.2
    scaling_coefficient: float = 0.6

    @property
    def sides(self) -> Sides:
        """TIES looks at the entries of the right blocks."""
        return "left"

    def __post_init__(self) -> None:
        check_range("knots.density", self.density, 0.0, 1.0)

    def fuse_matrices(self, matrices: TaskMatrices) -> Tensor:
        """U · TIES of the right blocks."""
        num_tasks, columns = len(matrices.tasks), matrices.stacked.shape[-1]
        side_by_side = torch.cat(list(matrices.stacked), dim=1)
        left, sigma, _ = torch.linalg.svd(side_by_side, full_matrices=False)
        rank = matrices.cuts.rank(sigma, "task vectors side by side", _SMALLEST)
        blocks = left[:, :rank].T @ matrices.stacked  # Σ V_tᵀ
        blocks.masked_fill_(blocks.abs() <= _ROUNDING * sigma[:1].sum(), 0.0)  # zeros, which do not vote
        trimmed = torch.stack([_trim(block.flatten(), self.density) for block in blocks])
        vote = votes(trimmed, "mass")
        majority = -1.0 if vote.sign().sum() < 0 else 1.0
        fused: Tensor = left[:, :rank] @ disjoint_mean(trimmed, vote, majority, [1.0] * num_tasks).view(rank, columns)
        return fused


def _trim(values: Tensor, density: float) -> Tensor:
    """``values`` with all but its largest entries set to zero: those at least as large as the k-th smallest."""
    k = values.numel() - int(density * values.numel())
    if k == 0 or not values.numel():
        return values
    return values * (values.abs() >= values.abs().kthvalue(k).values)
