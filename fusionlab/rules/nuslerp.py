"""NuSLERP: spherical interpolation of two task vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusionlab.blocks.sums import cosines, inner_products
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError, name_list
from fusionlab.rules.base import Granularity, StatisticsScope, add_scaled
from fusionlab.rules.checks import by_task

_COLLINEAR = 1e-6  # of the sine; rounding alone makes 1e-8 of it in opposite task vectors


@dataclass(frozen=True)
class Nuslerp:
    """θ₀ + (sin((1−t)ω)·τ_a + sin(tω)·τ_b) / sin ω per tensor, ω the angle of τ_a and τ_b, t = w_b / (w_a + w_b).

    Unlike :class:`Slerp`, which turns the weights themselves. Collinear task vectors are interpolated linearly; a zero
    one is at a right angle to the other, as in mergekit. Norms and inner products in float64; two reads of the inputs.

    Args:
        weights: w of both tasks; only their ratio matters; equal by default.

    Raises:
        InputError: weights that sum to zero, or (when fusing) are not those of the tasks, or not two tasks.

    Example:
        >>> sums = {"squared_norm/a": 1.0, "squared_norm/b": 1.0, "inner_product/0/1": 0.0}
        >>> known = {key: {"w": (value,)} for key, value in sums.items()}
        >>> Nuslerp({"a": 2.0, "b": 1.0}).coefficients("w", ("a", "b"), Statistics(names=("w",), sums=known))
        {'a': 0.8660254037844387, 'b': 0.49999999999999994}

    Source: mergekit's merge method nuslerp over flattened tensors.
    """

    weights: Mapping[str, float] | None = None

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = (("squared_norm", "inner_product"),)
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.weights is not None and sum(self.weights.values()) == 0:
            raise InputError(f"nuslerp: the weights {dict(self.weights)} sum to 0; give weights with another sum.")

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Squared norms and the inner product."""
        return inner_products(task_vectors, norms=True)

    def coefficients(self, name: str, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        """What each task vector is multiplied by."""
        return statistics.once(("nuslerp", name), lambda: self._coefficients(name, tasks, statistics))

    def _coefficients(self, name: str, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        if len(tasks) != 2:
            raise InputError(f"nuslerp is between two task vectors, got {len(tasks)}: {name_list(tasks)}.")
        first, second = by_task(1.0 if self.weights is None else self.weights, tasks, "nuslerp.weights").values()
        t = second / (first + second)
        angle = math.acos(cosines(name, tasks, statistics)[0, 1])
        if math.sin(angle) < _COLLINEAR:
            return {tasks[0]: 1 - t, tasks[1]: t}
        return {tasks[0]: math.sin((1 - t) * angle) / math.sin(angle), tasks[1]: math.sin(t * angle) / math.sin(angle)}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + the interpolated task vector."""
        return add_scaled(base, task_vectors, self.coefficients(name, task_vectors.tasks, statistics))
