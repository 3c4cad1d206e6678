"""Iso-C: the sum of the task matrices with all its singular values made equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusionlab.blocks.matrices import TaskMatrices
from fusionlab.rules.matrix_rule import MatrixRule


@dataclass(frozen=True)
class IsoC(MatrixRule):
    """θ₀ + λ σ̄ U Vᵀ per matrix, with U σ Vᵀ the decomposition of Σ τ_t and σ̄ the mean of its singular values.

    Numerically zero singular values are left out, also of the mean: over adapters the official code, whose mean is over
    all min(m, n), has an update that is shorter by their share. Tensors that are not matrices get λ times the mean task
    vector. In float64.

    Args:
        scaling_coefficient: λ; for adapters to be searched for itself.

    Source: No task left behind: isotropic model merging, arXiv 2502.04959, section 4.
    """

    scaling_coefficient: float = 1.0

    over_adapters: ClassVar[str] = (
        "iso_c takes the mean over the singular values that are there, the official code over all min(m, n): over "
        "adapters its update is shorter by that share, so λ is to be searched anew"
    )

    def fuse_matrices(self, matrices: TaskMatrices) -> Tensor:
        """σ̄ U Vᵀ."""
        left, sigma, right = matrices.cuts.triplets(matrices.total(), "sum of the task vectors")
        return (left @ right).mul_(sigma.mean() if sigma.numel() else 0.0)
