"""The second half of TIES: elect a sign for every entry, and average those that agree with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusionlab.blocks import scratch
from fusionlab.blocks.sums import partial_sums, widened
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError
from fusionlab.rules.base import Granularity, StatisticsScope
from fusionlab.rules.checks import by_task


@dataclass(frozen=True)
class DisjointMean:
    """θ₀ + λ · mean of the τ_t whose sign is the elected one, entry by entry; zeros do not count.

    Args:
        scaling_coefficient: λ.
        election: the sign of the sum of τ_t (``mass``), or of most of the τ_t (``count``).
        weights: a factor on every task vector before electing; the mean is then over the agreeing weights.
        normalize: divide by the number (or weights) of the agreeing; otherwise λ · their sum.
        zero_sum: where the votes cancel out, the sign that most entries elected (``majority``), or ``positive``.
        scope: what the majority is taken over.

    Raises:
        InputError: an unknown choice, or (when fusing) weights that are not those of the tasks.

    Source: TIES-Merging, arXiv 2306.01708, section 4.2 and 4.3.
    """

    scaling_coefficient: float = 1.0
    election: Literal["mass", "count"] = "mass"
    weights: Mapping[str, float] | None = None
    normalize: bool = True
    zero_sum: Literal["majority", "positive"] = "majority"
    scope: Literal["model", "tensor"] = "model"

    granularity: ClassVar[Granularity] = "elementwise"
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        choices = {"election": ("mass", "count"), "zero_sum": ("majority", "positive"), "scope": ("model", "tensor")}
        for what, known in choices.items():
            if getattr(self, what) not in known:
                raise InputError(f"{what}: expected {' or '.join(known)}, got {getattr(self, what)!r}.")

    @property
    def statistics_scope(self) -> StatisticsScope:
        """What the majority is taken over."""
        return self.scope

    @property
    def passes(self) -> tuple[tuple[str, ...], ...]:
        """The balance of the elected signs, if it can matter."""
        return (("signs",),) if self.zero_sum == "majority" else ()

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """The number of entries that elected plus, less those that elected minus."""
        with scratch.frame():
            elected = self._votes(self._weighted(task_vectors)).sign_()
            return {self._key(name): partial_sums(widened(elected.view(1, -1))).sum().long().view(1)}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + λ · mean."""
        weighted = self._weighted(task_vectors)
        majority = 1.0
        if self.zero_sum == "majority" and int(statistics.counts[self._key(name)]) < 0:
            majority = -1.0
        weights = [1.0] * len(weighted) if self.weights is None else [self.weights[task] for task in task_vectors.tasks]
        update = disjoint_mean(weighted, self._votes(weighted), majority, weights if self.normalize else None)
        return update.mul_(self.scaling_coefficient).add_(base)

    def _key(self, name: str) -> str:
        return f"signs/{name}" if self.scope == "tensor" else "signs"

    def _weighted(self, task_vectors: TaskVectors) -> Tensor:
        if self.weights is None:
            return task_vectors.stacked
        weights = by_task(self.weights, task_vectors.tasks, "weights")
        weighted = scratch.empty_like(task_vectors.stacked)
        for row, task in zip(weighted, task_vectors.tasks, strict=True):
            torch.mul(task_vectors[task], weights[task], out=row)
        return weighted

    def _votes(self, task_vectors: Tensor) -> Tensor:
        return votes(task_vectors, self.election)


def votes(task_vectors: Tensor, election: str) -> Tensor:
    """The sum of the task vectors or of their signs, in recipe order; its sign is the elected one.

    Args:
        task_vectors: ``(num_tasks, elements)``.
        election: ``mass`` or ``count``.
    """
    total = scratch.empty_like(task_vectors[0]).zero_()
    with scratch.frame():
        sign = scratch.empty_like(total)
        for task_vector in task_vectors:
            total += task_vector if election == "mass" else torch.sign(task_vector, out=sign)
    return total


def disjoint_mean(task_vectors: Tensor, vote: Tensor, majority: float, weights: list[float] | None) -> Tensor:
    """The mean over the entries that have the sign of ``vote``; without ``weights`` their sum.

    Args:
        task_vectors: ``(num_tasks, elements)``, already weighted.
        vote: ``(elements)``; zero counts as ``majority``.
        majority: 1 or -1.
        weights: what an entry counts in the mean, by task.

    Example:
        >>> disjoint_mean(torch.tensor([[3.0, 1.0], [-1.0, 2.0]]), torch.tensor([2.0, 3.0]), 1.0, [1.0, 1.0])
        tensor([3.0000, 1.5000])
    """
    total = scratch.empty_like(vote).zero_()
    with scratch.frame():
        elected, divisor, agree, part = (scratch.empty_like(vote) for _ in range(4))
        torch.eq(vote, 0, out=agree)
        torch.sign(vote, out=elected).add_(agree.mul_(majority))
        divisor.zero_()
        for row, task_vector in enumerate(task_vectors):
            torch.sign(task_vector, out=part).mul_(elected)
            torch.gt(part, 0, out=agree)
            total += torch.mul(task_vector, agree, out=part)
            if weights is not None:
                divisor += agree.mul_(weights[row])
        if weights is not None:
            torch.lt(torch.abs(divisor, out=part), 1e-8, out=agree)  # nothing agrees: divide by one
            total.div_(divisor.mul_(part.fill_(1.0).sub_(agree)).add_(agree))
    return total
