"""Model Stock: how far to go from the base to the mean, by how much the task vectors agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

from torch import Tensor

from fusionlab.blocks.sums import cosines, inner_products
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.rules.base import Granularity, StatisticsScope, add_scaled
from fusionlab.rules.checks import check_range

_POLE = 1e-6


@dataclass(frozen=True)
class ModelStock:
    """θ₀ + t Σ τ_t / N per tensor, with t = N c̄ / (1 + (N − 1) c̄) and c̄ the mean cosine of all pairs of the N τ_t.

    The cosine of a pair with a zero τ is 0, so that t is 0 where all are zero, and where one of two is; for N = 1, t
    is 1. A negative c̄, of task vectors that work against one another, makes t negative and is named in ``fusion.json``;
    at the pole c̄ = −1/(N − 1), where the task vectors cancel out, the base stays. Norms and inner products in float64;
    two reads of the inputs. There is no coefficient.

    Args:
        least_norms: what the product of two norms counts as at least; with mergekit's 1e-6 task vectors as short as
            those of norms and biases often are count as orthogonal.

    Raises:
        InputError: a negative ``least_norms``.

    Example:
        >>> sums = {"squared_norm/a": 4.0, "squared_norm/b": 9.0, "inner_product/0/1": 3.0}
        >>> known = {key: {"w": (value,)} for key, value in sums.items()}
        >>> ModelStock().coefficients("w", ("a", "b"), Statistics(names=("w",), sums=known))
        {'a': 0.3333333333333333, 'b': 0.3333333333333333}

    Source: Model Stock: all we need is just a few fine-tuned models, arXiv 2403.19522, section 4.2.
    """

    least_norms: float = 0.0

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = (("squared_norm", "inner_product"),)
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("model_stock.least_norms", self.least_norms, 0.0, math.inf)

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Squared norms and inner products."""
        return inner_products(task_vectors, norms=True)

    def coefficients(self, name: str, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        """t/N for every task."""
        step = statistics.once(("model_stock", name), lambda: self._step(name, tasks, statistics))
        return dict.fromkeys(tasks, step / len(tasks))

    def _step(self, name: str, tasks: tuple[str, ...], statistics: Statistics) -> float:
        count = len(tasks)
        if count == 1:
            return 1.0
        found = cosines(name, tasks, statistics)
        mean = sum(found[pair] * self._share(name, tasks, pair, statistics) for pair in combinations(range(count), 2))
        mean /= count * (count - 1) / 2
        divisor = 1 + (count - 1) * mean
        if divisor < _POLE:
            statistics.remark(name, [f"the task vectors cancel out (mean cosine {mean:.4f}): the base is kept"])
            return 0.0
        step = count * mean / divisor
        if mean < 0:
            statistics.remark(name, [f"the mean cosine of the task vectors is {mean:.4f}: a step of {step:.4f}"])
        return step

    def _share(self, name: str, tasks: tuple[str, ...], pair: tuple[int, int], statistics: Statistics) -> float:
        """What is left of the cosine of a pair whose norms are small."""
        if not self.least_norms:
            return 1.0
        product = math.prod(math.sqrt(statistics.sum(f"squared_norm/{tasks[number]}", [name])) for number in pair)
        return min(1.0, product / self.least_norms)

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + t times the mean."""
        return add_scaled(base, task_vectors, self.coefficients(name, task_vectors.tasks, statistics))
