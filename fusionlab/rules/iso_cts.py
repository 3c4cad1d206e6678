"""Iso-CTS: Iso-C with room for what single tasks have beside the common space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionlab.blocks.matrices import CUT, TaskMatrices
from fusionlab.rules.checks import check_range
from fusionlab.rules.matrix_rule import MatrixRule


@dataclass(frozen=True)
class IsoCts(MatrixRule):
    """θ₀ + λ σ̄ U' V'ᵀ per matrix, from the c leading directions of Σ τ_t and k more of each task beside them.

    With r the rank of Σ τ_t, the share of it that is not common is shared out evenly: k = round((r −
    int(common_space · r)) / T) for each of T tasks, and c = r − k·T; k is 0, and the rule Iso-C, where T is twice that
    rest or more. A task's k triplets are those of (I − U_c U_cᵀ) τ_t. U' and V' are the polar factors of all
    vectors side by side, σ̄ is the mean of all kept singular values. The official code takes min(m, n) for r, which for
    adapters leaves no task any room. Numerically zero singular values are left out everywhere. Tensors that are not
    matrices get λ times the mean task vector. In float64; T + 3 decompositions of a matrix.

    Args:
        common_space: the share of the rank that the common space gets at first.
        scaling_coefficient: λ; to be chosen on validation, about 1.5 in the paper's experiments.

    Raises:
        InputError: a share outside 0..1.

    Source: No task left behind: isotropic model merging, arXiv 2502.04959, section 5, algorithm 2.
    """

    common_space: float = 0.8
    scaling_coefficient: float = 1.0

    over_adapters: ClassVar[str] = (
        "iso_cts takes the mean over the singular values that are there, the official code over all min(m, n): over "
        "adapters its update is shorter by that share, so λ is to be searched anew"
    )

    def __post_init__(self) -> None:
        check_range("iso_cts.common_space", self.common_space, 0.0, 1.0)

    def fuse_matrices(self, matrices: TaskMatrices) -> Tensor:
        """σ̄ U' V'ᵀ."""
        cuts = matrices.cuts
        left, sigma, right = cuts.triplets(matrices.total(), "sum of the task vectors")
        rank, num_tasks = len(sigma), len(matrices.tasks)
        if not rank:
            return torch.zeros_like(matrices.stacked[0])
        of_task = round((rank - int(self.common_space * rank)) / num_tasks)
        common = rank - of_task * num_tasks
        lefts, values, rights = [left[:, :common]], [sigma[:common]], [right[:common]]
        for task, task_matrix in zip(matrices.tasks, matrices.stacked, strict=True):
            beside = task_matrix - lefts[0] @ (lefts[0].T @ task_matrix)
            cut = CUT * float(torch.linalg.matrix_norm(task_matrix, 2))  # nothing may be left but rounding
            own_left, own_sigma, own_right = cuts.triplets(beside, f"{task} beside the common space", cut)
            lefts.append(own_left[:, :of_task])
            values.append(own_sigma[:of_task])
            rights.append(own_right[:of_task])
        left = cuts.polar_factor(torch.cat(lefts, dim=1), "left vectors side by side")
        right = cuts.polar_factor(torch.cat(rights), "right vectors side by side")
        return (left @ right).mul_(torch.cat(values).mean())
