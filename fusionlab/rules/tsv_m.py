"""TSV-M: the leading singular vectors of every task, made orthogonal to those of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionlab.blocks.matrices import TaskMatrices
from fusionlab.rules.matrix_rule import MatrixRule


@dataclass(frozen=True)
class TsvM(MatrixRule):
    """θ₀ + λ U' Σ V'ᵀ per matrix, from the int(min(m, n)/T) leading singular triplets of each task side by side.

    U' and V' are the polar factors of the concatenated singular vectors. Numerically zero singular values are left
    out, of the tasks and of the concatenations: tasks with one A have one space of right vectors, so that V' holds each
    with 1/√T of its length and the update is shorter by as much than with independent A. The official code keeps
    min(m, n)/T vectors also where their σ is zero, which are arbitrary ones: over adapters its result differs by about
    half of the update. Of a matrix with fewer rows or columns than there are tasks, where int(min(m, n)/T) is 0 and the
    official code leaves the base, one triplet of each task is taken. Tensors that are not matrices get λ times the mean
    task vector. In float64.

    Args:
        scaling_coefficient: λ; for adapters, whose update is shorter where they share A, to be searched for itself.

    Source: Task singular vectors, arXiv 2412.00081, algorithm 1.
    """

    scaling_coefficient: float = 1.0

    over_adapters: ClassVar[str] = (
        "tsv_m leaves out vectors whose singular value is zero, which the official code keeps: over adapters the two "
        "differ by about half of the update; tasks with one A have an update 1/√T as long, so λ is to be searched anew"
    )

    def fuse_matrices(self, matrices: TaskMatrices) -> Tensor:
        """U' Σ V'ᵀ."""
        kept = max(1, min(matrices.shape) // len(matrices.tasks))
        lefts, values, rights = [], [], []
        for task, task_matrix in zip(matrices.tasks, matrices.stacked, strict=True):
            left, sigma, right = matrices.cuts.triplets(task_matrix, task)
            lefts.append(left[:, :kept])
            values.append(sigma[:kept])
            rights.append(right[:kept])
        left = matrices.cuts.polar_factor(torch.cat(lefts, dim=1), "left vectors of all tasks side by side")
        right = matrices.cuts.polar_factor(torch.cat(rights), "right vectors of all tasks side by side")
        return (left * torch.cat(values)) @ right
