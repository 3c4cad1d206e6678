"""The Karcher mean of the fine-tuned weights: their mean on the sphere, at their mean length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fusionlab.blocks import scratch
from fusionlab.blocks.sums import inner_products
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError
from fusionlab.rules.base import Granularity, StatisticsScope

_OPPOSITE = 1e-5  # of an angle to half a turn; nearer, all that is left of the direction is rounding


@dataclass(frozen=True)
class Karcher:
    """Σ ‖θ_t‖/T · m per tensor, m the unit vector whose summed squared angles to all θ_t = θ₀ + τ_t are least.

    From the normalised mean of the directions, at most ``max_iterations`` times along the mean of the logarithms, until
    a step is shorter than ``tolerance``. m is a weighted sum of the θ_t, so that all that is measured is their inner
    products, in float64; two reads of the inputs. A zero θ_t has no direction and shortens the result; to one opposite
    to m, as a number of the other sign, no direction leads from m, and it counts by its length only; where the
    directions cancel out there is no such mean, and the plain one is taken. The last two are named in ``fusion.json``.

    Args:
        max_iterations: at most; mergekit's is 10.
        tolerance: an angle.

    Raises:
        InputError: no iterations, or a tolerance that is not positive.

    Source: Karcher, Riemannian center of mass, 1977; mergekit's merge method karcher.
    """

    max_iterations: int = 10
    tolerance: float = 1e-5

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = (("karcher",),)
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.max_iterations < 1 or not self.tolerance > 0:
            raise InputError(
                f"karcher: max_iterations and tolerance must be positive, got {self.max_iterations}, {self.tolerance}."
            )

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """The inner products of all pairs of weights, each with itself included."""
        found = inner_products(task_vectors.replace(_weights(base, task_vectors)), norms=True)
        return {f"karcher/{number}": values for number, values in enumerate(found.values())}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """The mean."""
        scales = statistics.once(("karcher", name), lambda: self._scales(name, len(task_vectors), statistics))
        weights = _weights(base, task_vectors)
        total = scratch.empty_like(base).zero_()
        for scale, each in zip(scales, weights, strict=True):
            total += each.mul_(scale)
        return total

    def _scales(self, name: str, num_tasks: int, statistics: Statistics) -> list[float]:
        """What each θ_t is multiplied by."""
        gram = np.zeros((num_tasks, num_tasks))
        for number, (row, column) in enumerate(zip(*np.triu_indices(num_tasks), strict=True)):
            gram[row, column] = gram[column, row] = statistics.sum(f"karcher/{number}", [name])
        lengths = np.sqrt(gram.diagonal())
        present = lengths > 0
        if not present.any():
            return [0.0] * num_tasks
        cosines = gram[np.ix_(present, present)] / np.outer(lengths[present], lengths[present])
        mean = self._mean(cosines)
        if mean is None:
            statistics.remark(name, ["the directions of the weights cancel out: their plain mean is taken"])
            return [1 / num_tasks] * num_tasks
        if (cosines @ mean).min() < -math.cos(_OPPOSITE):
            statistics.remark(name, ["weights opposite to the mean, to which no direction leads, count by length only"])
        scales = np.zeros(num_tasks)
        scales[present] = lengths.mean() * mean / lengths[present]
        return [float(scale) for scale in scales]

    def _mean(self, cosines: np.ndarray) -> np.ndarray | None:
        """The mean of unit vectors with these inner products, by its coefficients; None where there is none."""
        count = len(cosines)
        mean = np.full(count, 1 / count)
        if (length := _length(mean, cosines)) < self.tolerance:
            return None
        mean = mean / length
        for _ in range(self.max_iterations):
            along = np.clip(cosines @ mean, -1.0, 1.0)
            angles = np.arccos(along)
            still = (angles < self.tolerance) | (angles > math.pi - _OPPOSITE)
            stretch = np.where(still, 0.0, angles / np.maximum(np.sin(angles), 1e-300)) / count
            step = stretch - (stretch @ along) * mean
            if (length := _length(step, cosines)) < self.tolerance:
                break
            mean = math.cos(length) * mean + math.sin(length) / length * step
            mean = mean / _length(mean, cosines)
        return mean


def _length(coefficients: np.ndarray, cosines: np.ndarray) -> float:
    return math.sqrt(max(0.0, coefficients @ cosines @ coefficients))


def _weights(base: Tensor, task_vectors: TaskVectors) -> Tensor:
    return torch.add(task_vectors.stacked, base, out=scratch.empty_like(task_vectors.stacked))
