"""SCE: select the entries in which tasks differ, weigh the tasks by what is left, erase minority signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionlab.blocks import magnitudes, scratch
from fusionlab.blocks.sums import squared_norms
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.rules.base import Granularity, StatisticsScope
from fusionlab.rules.checks import check_range
from fusionlab.rules.largest import Largest

_VARIANCE = Largest("tensor", "first", "variance_")
_ALL = "tasks"  # whose variance it is


@dataclass(frozen=True)
class Sce:
    """θ₀ + λ Σ w_t E_t τ_t / Σ w_t E_t, entry by entry, from the entries of largest variance over the tasks.

    Per tensor: of the entries whose variance over tasks is not zero, the int(density · their number) of largest
    variance stay in the τ_t, the others become zero; then w_t is the squared norm of τ_t over that of all; E_t is 1
    where τ_t has the sign of Σ τ_t, a sum of zero being plus, else 0. Where nothing agrees the base stays. Variances in
    float64, ranked in float32, those of the lowest flat index first; five reads of the inputs, two at density 1.

    Args:
        density: the share of entries to keep; the paper's is 0.1, mergekit's 1.
        scaling_coefficient: λ.
        equal_below: mean squares of the τ_t that sum to less than this leave w_t equal; mergekit's is 1e-6.

    Raises:
        InputError: a density outside 0..1.

    Source: FuseChat, arXiv 2408.07990, section 3.3.
    """

    density: float = 1.0
    scaling_coefficient: float = 1.0
    equal_below: float = 0.0

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("sce.density", self.density, 0.0, 1.0)

    @property
    def passes(self) -> tuple[tuple[str, ...], ...]:
        """The variances' histograms and the number of those above zero, and the squared norms of what is kept."""
        if self.density == 1:
            return (("squared_norm",),)
        first, *others = _VARIANCE.steps
        return ((first, "differing"), *((step,) for step in others), ("selected",))

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """The next of these."""
        if self.density == 1:
            return squared_norms(task_vectors)
        step = next((step for step in _VARIANCE.steps if not earlier.has(step)), None)
        if step is None:
            with scratch.frame():
                norms = squared_norms(self._selected(name, task_vectors, earlier))
            return {key.replace("squared_norm/", "selected/"): values for key, values in norms.items()}
        with scratch.frame():
            spread, block = _spread(task_vectors.stacked), (task_vectors.start, task_vectors.size)
            if step == _VARIANCE.steps[0]:
                counts = {f"differing/{name}": torch.count_nonzero(spread).view(1)}
                return counts | _VARIANCE.measure(step, _ALL, name, spread, block, (), earlier)
            return _VARIANCE.measure(step, _ALL, name, spread, block, (self._rank(name, earlier),), earlier)

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + λ times what agrees, weighted."""
        quantity = "squared_norm" if self.density == 1 else "selected"
        norms = [statistics.sum(f"{quantity}/{task}", [name]) for task in task_vectors.tasks]
        total = sum(norms)
        weights = [norm / total if total > self.equal_below * task_vectors.size else 1 / len(norms) for norm in norms]
        if self.density < 1:
            task_vectors = self._selected(name, task_vectors, statistics)
        return _agreeing(task_vectors.stacked, weights).mul_(self.scaling_coefficient).add_(base)

    def _rank(self, name: str, statistics: Statistics) -> int:
        return int(self.density * int(statistics.counts[f"differing/{name}"]))

    def _selected(self, name: str, task_vectors: TaskVectors, statistics: Statistics) -> TaskVectors:
        selected = scratch.empty_like(task_vectors.stacked)
        with scratch.frame():
            sizes = magnitudes.sizes(_spread(task_vectors.stacked))
            kept = _VARIANCE.mask(_ALL, name, sizes, task_vectors.start, self._rank(name, statistics), statistics)
            torch.mul(task_vectors.stacked, kept, out=selected)
        return task_vectors.replace(selected)


def _spread(stacked: Tensor) -> Tensor:
    """The standard deviation over tasks, which is ranked as the variance is and does not underflow; float32."""
    mean, squares, part = (scratch.empty_like(stacked[0], torch.float64) for _ in range(3))
    mean.zero_()
    squares.zero_()
    for task_vector in stacked:
        mean += task_vector
    mean /= len(stacked)
    for task_vector in stacked:
        squares += torch.sub(task_vector, mean, out=part).square_()
    return squares.div_(len(stacked)).sqrt_().float()


def _agreeing(stacked: Tensor, weights: list[float]) -> Tensor:
    """Σ w_t E_t τ_t / Σ w_t E_t; 0 where the divisor is."""
    result = scratch.empty_like(stacked[0]).zero_()
    with scratch.frame():
        vote, divisor, sign, agree = (scratch.empty_like(result) for _ in range(4))
        vote.zero_()
        divisor.zero_()
        for task_vector in stacked:
            vote += task_vector
        torch.ge(vote, 0, out=vote).mul_(2).sub_(1)
        for task_vector, weight in zip(stacked, weights, strict=True):
            torch.eq(torch.sign(task_vector, out=sign), vote, out=agree).mul_(weight)
            divisor += agree
            result += agree.mul_(task_vector)
        result.div_(divisor.add_(torch.eq(divisor, 0, out=agree)))
    return result
