"""Task matrices in float64, and decompositions whose numerical rank is said."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

CUT = 1e-5
_CANCELLED = 1e-12  # of the task matrices' norm: what rounding leaves of a sum of which nothing is left
Sides = Literal["both", "left", "none"]
_SHOWN = 4


@dataclass
class Cuts:
    """Where numerically zero singular values were left out, and which ones lay so near the cut that it is a choice.

    Args:
        near: a sentence for every spectrum with values within ten times of its cut.
    """

    near: list[str] = field(default_factory=list)

    def rank(self, sigma: Tensor, what: str, cut: float | None = None) -> int:
        """How many of ``sigma`` are above ``cut``, 1e-5 of the largest by default.

        A σ below that is what float32 rounding of low-rank task vectors leaves, and has arbitrary vectors: keeping them
        would change what the rules do.

        Args:
            sigma: in descending order.
            what: whose they are.
            cut: the smallest value that is dropped.
        """
        largest = float(sigma[0]) if sigma.numel() else 0.0
        cut = CUT * largest if cut is None else cut
        rank = int((sigma > cut).sum())
        near = sigma[(sigma >= cut / 10) & (sigma <= cut * 10)] if cut > 0 else sigma[:0]
        if len(near):
            shown = ", ".join(f"{value:.2g}" for value in near[:_SHOWN].tolist())
            more = f" and {len(near) - _SHOWN} more" if len(near) > _SHOWN else ""
            kept = int((near > cut).sum())
            self.near.append(
                f"{what}: {len(near)} singular values within ten times of the cut at {cut:.2g} ({shown}{more}; the "
                f"largest is {largest:.2g}); {kept} kept, {len(near) - kept} dropped"
            )
        return rank

    def triplets(self, matrix: Tensor, what: str, cut: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """U ``(m, r)``, σ ``(r)``, Vᵀ ``(r, n)`` of a float64 matrix, without the numerically zero σ."""
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        rank = self.rank(sigma, what, cut)
        return left[:, :rank], sigma[:rank], right[:rank]

    def polar_factor(self, matrix: Tensor, what: str) -> Tensor:
        """P Qᵀ of the singular value decomposition P Σ Qᵀ, without the directions whose σ is numerically zero.

        Of full rank it is the nearest matrix with orthonormal columns (or rows). Directions that the matrix does not
        have would be arbitrary in it: of two tasks with the same vectors, any rotation of one against the other.
        """
        left, _, right = self.triplets(matrix, what)
        return left @ right


@dataclass(frozen=True)
class TaskMatrices:
    """The task vectors of one weight as matrices.

    Args:
        tasks: the tasks, in recipe order.
        stacked: float64, ``(num_tasks, m, n)``: Uᵀ τ_t V in some orthonormal bases of the weight's two sides that
            hold all τ_t; the τ_t themselves in the whole weight's own.
        shape: of the weight, ``(out, in)``.
        dtype: of the weight's blocks, float32 or wider, which rules with many steps may compute in.
        cuts: takes note of doubtful ranks.
    """

    tasks: tuple[str, ...]
    stacked: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float64
    cuts: Cuts = field(default_factory=Cuts)

    def total(self) -> Tensor:
        """Σ τ_t, in recipe order; zero where they cancel out, which in a basis they do but for rounding."""
        total = torch.zeros_like(self.stacked[0])
        for task_matrix in self.stacked:
            total += task_matrix
        return total.zero_() if total.norm() <= _CANCELLED * self.stacked.norm() else total
