"""WUDI: the update that disturbs the tasks least in the directions that their task vectors use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusionlab.blocks.matrices import TaskMatrices
from fusionlab.errors import InputError
from fusionlab.rules.matrix_rule import MatrixRule, Sides

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_CONVERGED = 1e-6  # of the gradient, relative to R: what is left of it by rounding would be made full steps of
_ILL_CONDITIONED = 100.0


@dataclass(frozen=True)
class Wudi(MatrixRule):
    """θ₀ + λ τ per matrix, τ going from Σ τ_t toward the least Σ_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖².

    With P = Σ τ_tᵀτ_t/‖τ_t‖² and R = Σ τ_t τ_tᵀτ_t/‖τ_t‖², made once in float64, the gradient is 2(τP − R), whatever
    the number of tasks: 2·out·in² operations a step, in the dtype of the inputs. Stopping early regularises. A step is
    ``learning_rate`` times the root mean square of an entry of Σ τ_t (as if the τ_t were orthogonal), so that larger
    task vectors move as much more. Tasks with a zero τ_t are left out. Tensors that are not matrices get λ times the
    mean task vector.

    ``gradient`` is Adam with one second moment for the whole matrix, so that the result turns with the bases of its two
    sides, and is an adapter where the task vectors are; ``adam`` has one for every entry, as the official code, whose
    result over adapters is of full rank; ``closed_form`` is the limit of both, τ = R P⁺, RegMean with G_t =
    τ_tᵀτ_t/‖τ_t‖².

    Args:
        scaling_coefficient: λ; without one in the paper, for adapters to be searched.
        solver: see above.
        num_steps: at most; a gradient that is rounding ends the descent.
        learning_rate: relative; the official code's is absolute, 1e-5.

    Raises:
        InputError: steps or a rate that are not positive, or (when fusing by ``closed_form``) task vectors whose ranks
            together are near the width of a matrix, where the limit follows noise.

    Source: Whoever started the interference should end it, arXiv 2503.08099, section 4. The paper divides by ‖τ_t‖²; so
        does this; its code for ViT by ‖τ_t‖.
    """

    scaling_coefficient: float = 1.0
    solver: Literal["gradient", "adam", "closed_form"] = "gradient"
    num_steps: int = 300
    learning_rate: float = 0.003

    def __post_init__(self) -> None:
        if self.solver not in ("gradient", "adam", "closed_form"):
            raise InputError(f"wudi.solver: expected gradient, adam or closed_form, got {self.solver!r}.")
        if self.num_steps < 1 or not 0 < self.learning_rate < 1e6:
            raise InputError(
                f"wudi: num_steps and learning_rate must be positive, the latter below 1e6, got {self.num_steps}, "
                f"{self.learning_rate}."
            )

    @property
    def sides(self) -> Sides:
        """Adam looks at entries."""
        return "none" if self.solver == "adam" else "both"

    def flops(self, shape: tuple[int, int]) -> float:
        """Floating-point operations of the steps on a weight of this shape."""
        return 2.0 * self.num_steps * shape[0] * shape[1] ** 2 if self.solver != "closed_form" else 0.0

    def check_ranks(self, name: str, shape: tuple[int, int], ranks: list[int], joint: int) -> None:
        """Refuse the closed form where the tasks' rows together nearly fill the space that they are in."""
        near = shape[1] < 2 * joint and sum(ranks) < 2 * shape[1]
        if self.solver == "closed_form" and len(ranks) > 1 and near:
            raise InputError(
                f"wudi.solver: the closed form of {name} follows noise: {len(ranks)} task vectors have a rank of "
                f"{sum(ranks)} together, near the width of {shape[1]}; say solver: gradient, which stops before that."
            )

    def fuse_matrices(self, matrices: TaskMatrices) -> Tensor:
        """τ."""
        present = [task_matrix for task_matrix in matrices.stacked if task_matrix.any()]
        if not present:
            return torch.zeros_like(matrices.stacked[0])
        return (
            self._closed_form(present, matrices) if self.solver == "closed_form" else self._descend(present, matrices)
        )

    def _closed_form(self, present: list[Tensor], matrices: TaskMatrices) -> Tensor:
        """R P⁺ from the singular values of the normalised τ_t above one another, whose square P is."""
        norms = [torch.linalg.matrix_norm(task_matrix) for task_matrix in present]
        stacked = torch.cat([each / norm for each, norm in zip(present, norms, strict=True)])
        left, sigma, right = matrices.cuts.triplets(stacked, "task vectors above one another")
        ranks = [
            matrices.cuts.rank(torch.linalg.svdvals(each), f"task vector {number}")
            for number, each in enumerate(present)
        ]
        self.check_ranks("this matrix", matrices.shape, ranks, len(sigma))
        if len(sigma) and float(sigma[0] / sigma[-1]) > _ILL_CONDITIONED:
            matrices.cuts.near.append(
                f"closed form of condition {float(sigma[0] / sigma[-1]):.2g}, which it amplifies by"
            )
        products = torch.cat([each @ each.T / norm for each, norm in zip(present, norms, strict=True)], dim=1)
        return (products @ left / sigma) @ right

    def _descend(self, present: list[Tensor], matrices: TaskMatrices) -> Tensor:
        """Adam from Σ τ_t, with one second moment, or one for every entry."""
        squares = [each.square().sum() for each in present]
        grams = [each.T @ each / square for each, square in zip(present, squares, strict=True)]
        products = [each @ gram for each, gram in zip(present, grams, strict=True)]
        gram, product = (torch.stack(parts).sum(0).to(matrices.dtype) for parts in (grams, products))
        update = matrices.total().to(matrices.dtype)
        count = update.numel() if self.solver == "adam" else 1  # of the second moments; else it does not matter
        unit = math.sqrt(float(sum(squares)) / count)
        first = torch.zeros_like(update)
        second = torch.zeros_like(update if self.solver == "adam" else update[0, 0])
        converged = _CONVERGED * float(product.norm())
        for step in range(1, self.num_steps + 1):
            gradient = torch.addmm(product, update, gram, beta=-1)
            if float(gradient.norm()) <= converged:
                break
            first.lerp_(gradient, 1 - _BETAS[0])
            square = gradient.square()
            second.lerp_(square if self.solver == "adam" else square.sum(), 1 - _BETAS[1])
            scale = math.sqrt(1 - _BETAS[1] ** step)
            divisor = second.sqrt().div_(scale).add_(_EPSILON * unit)
            update.addcdiv_(first, divisor, value=-self.learning_rate * unit / (1 - _BETAS[0] ** step))
        return update.double()
