"""Singular values of whole task matrices in float64, for the rules that work on them."""

from __future__ import annotations

import torch
from torch import Tensor

from fusionlab.rules.base import TaskVectors

_TOLERANCE = 1e-5


def singular_triplets(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U ``(m, r)``, σ ``(r)``, Vᵀ ``(r, n)`` of a float64 matrix, without the numerically zero σ.

    A σ below 1e-5 of the largest is what float32 rounding of low-rank task vectors leaves, and has arbitrary vectors:
    keeping them would change what the rules do.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((values > _TOLERANCE * values[0]).sum()) if values.numel() else 0
    return left[:, :rank], values[:rank], right[:rank]


def polar_factor(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows): P Qᵀ from the singular value decomposition P Σ Qᵀ."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def mean(task_vectors: TaskVectors) -> Tensor:
    """Σ τ_t / T, in recipe order: what these rules do with tensors that are not matrices."""
    total = torch.zeros_like(task_vectors.stacked[0])
    for task_vector in task_vectors.stacked:
        total += task_vector
    return total.div_(len(task_vectors))
