"""Task matrices weighted by the Gram matrices of what their layers read: the rule that RegMean and RegMean++ find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, TypeGuard

import torch
from torch import Tensor

from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError
from fusionlab.rules.base import Granularity, StatisticsScope
from fusionlab.rules.carried import UNTOLD, check_carried, check_known, hash_of
from fusionlab.rules.checks import check_range
from fusionlab.rules.matrix_rule import MatrixRule, has_core, mean


@dataclass(frozen=True)
class LayerInputs:
    """What a linear layer read.

    Args:
        grams: by task, G = Σ x xᵀ / number of x, float64 ``(in, in)``; several of a matrix that holds as many layers
            of equally many rows one below the other.
        transposed: whether the weight is stored ``(in, out)``.
    """

    grams: Mapping[str, tuple[Tensor, ...]]
    transposed: bool = False


Layers = Mapping[str, LayerInputs]


@dataclass(frozen=True)
class WeightedByGrams:
    """θ₀ + (Σ τ_t Ĝ_t)(Σ Ĝ_t)⁻¹ per linear layer with Ĝ_t = a G_t + (1 − a) diag(G_t) + floor·I; the mean elsewhere.

    It is the matrix that is nearest to every task's own on that task's inputs. Computed about the mean task vector, in
    float64, by a Cholesky decomposition: T·out·in² + in³/3 operations a layer. One task gives its own model; with
    G_t = I it is the average. Of adapters, whose B it leaves as they are, it makes an adapter of rank T·rank. Biases,
    norms, embeddings and all that no linear layer multiplies get the mean.

    Args:
        off_diagonal: a, the share of the off-diagonal entries that is kept.
        floor: added to the diagonal of every Ĝ_t; a direction that no task's inputs have gets the mean.
        statistics: the hash of ``layers``, which stands for them in configurations.
        layers: by name on disk, what the layer read; given by the searches regmean and regmean_plus_plus.

    Raises:
        InputError: a not within 0 to 1, a floor that is not positive, or (when fusing) no statistics, those of other
            tasks or names, or a sum of Ĝ_t that is singular to rounding.

    Source: Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849, equation 3.
    """

    off_diagonal: float = 0.95
    floor: float = 1e-6
    statistics: str = ""
    layers: Layers = field(default_factory=dict, repr=False, compare=False, metadata=UNTOLD)

    granularity: ClassVar[Granularity] = "tensor"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = ()
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("off_diagonal", self.off_diagonal, 0, 1)
        check_range("floor", self.floor, 0, float("inf"), open_low=True)

    @classmethod
    def of(cls, off_diagonal: float, floor: float, layers: Layers) -> WeightedByGrams:
        """The rule with these statistics."""
        tensors = {
            f"{name} {task} {number}": gram
            for name, layer in layers.items()
            for task, grams in layer.grams.items()
            for number, gram in enumerate(grams)
        }
        return cls(off_diagonal, floor, hash_of(tensors), layers)

    @property
    def is_complete(self) -> bool:
        """Whether it has its statistics."""
        return bool(self.layers)

    def check(self, tasks: Sequence[str], names: Sequence[str]) -> None:
        """Raise unless it has statistics of these tasks, and of these names only.

        Raises:
            InputError: as when fusing.
        """
        check_carried("weighted_by_grams", "regmean, regmean_plus_plus", self._tasks, tasks)
        check_known("weighted_by_grams", self.layers, names)

    @cached_property
    def _tasks(self) -> dict[str, Mapping[str, tuple[Tensor, ...]]]:
        return {name: layer.grams for name, layer in self.layers.items()}

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Nothing is measured."""
        return {}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + the weighted mean, by layers."""
        names = statistics.names or tuple(self.layers)
        statistics.once("weighted_by_grams", lambda: self.check(task_vectors.tasks, names))
        layer = self.layers.get(name)
        if layer is None:
            return mean(task_vectors).add_(base)
        stacked = task_vectors.stacked.double()
        stacked = stacked.transpose(1, 2) if layer.transposed else stacked
        grams = [layer.grams[task] for task in task_vectors.tasks]
        num_parts = max(map(len, grams))
        parts = stacked.chunk(num_parts, dim=1)
        updates = [
            self._weighted(name, part, [of[number if len(of) > 1 else 0] for of in grams])
            for number, part in enumerate(parts)
        ]
        update = torch.cat(updates)
        return (update.T if layer.transposed else update).add(base).to(base.dtype).contiguous()

    def of_factors(self, name: str, tasks: Sequence[str], rights: Sequence[Tensor]) -> list[Tensor] | None:
        """What stands in the place of R_t where τ_t = L_t R_t: R_t Ĝ_t (Σ Ĝ)⁻¹, so that Σ L_t of it is the update.

        As R_t/T + R_t (Ĝ_t − Σ Ĝ / T)(Σ Ĝ)⁻¹, which is R_t to the bit for one task. One decomposition and T·rank
        solutions a layer: in³/3 + 2·T·rank·in² operations.

        Args:
            name: on disk.
            tasks: in the order of ``rights``.
            rights: R_t, float64 ``(rank_t, in)``.

        Returns:
            as ``rights``; None for a weight that no linear layer multiplies, of which the mean is taken.
        """
        layer = self.layers.get(name)
        if layer is None:
            return None
        grams = [self._regularized(layer.grams[task][0]) for task in tasks]
        total, count = sum(grams[1:], grams[0]), len(grams)
        factor = self._decomposed(name, total)
        return [
            right / count + torch.cholesky_solve(((gram - total / count) @ right.T), factor).T
            for right, gram in zip(rights, grams, strict=True)
        ]

    def _weighted(self, name: str, task_matrices: Tensor, grams: Sequence[Tensor]) -> Tensor:
        """(Σ τ_t Ĝ_t)(Σ Ĝ_t)⁻¹ of matrices ``(tasks, out, in)``, as τ̄ + (Σ (τ_t − τ̄) Ĝ_t)(Σ Ĝ_t)⁻¹."""
        middle = task_matrices.mean(0)
        total, rest = torch.zeros_like(grams[0]), torch.zeros_like(middle)
        for task_matrix, gram in zip(task_matrices, grams, strict=True):
            weight = self._regularized(gram)
            total += weight
            rest += (task_matrix - middle) @ weight
        return middle + torch.cholesky_solve(rest.T, self._decomposed(name, total)).T

    def _decomposed(self, name: str, total: Tensor) -> Tensor:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(total)
        if failed:
            raise InputError(
                f"{name}: the sum of the tasks' Gram matrices is singular to rounding with a floor of {self.floor:g} "
                f"(entries up to {float(total.abs().max()):.2g}); raise floor or lower off_diagonal"
            )
        return factor

    def _regularized(self, gram: Tensor) -> Tensor:
        diagonal = gram.diagonal()
        weight = self.off_diagonal * gram
        weight.diagonal().copy_(diagonal + self.floor)
        return weight


def makes_adapters(rule: object) -> TypeGuard[MatrixRule | WeightedByGrams]:
    """Whether ``rule``, which is no weighted sum, makes an adapter of adapters: in their core space, or by their A."""
    return has_core(rule) or isinstance(rule, WeightedByGrams)
