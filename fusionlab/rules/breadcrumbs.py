"""Breadcrumbs: of each tensor of a task vector leave out the very largest and all small entries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError
from fusionlab.rules.base import Granularity, StatisticsScope
from fusionlab.rules.task_arithmetic import TaskArithmetic
from fusionlab.rules.trim import Trim


class _Crumbs(Trim):
    """A trim that keeps nothing of a tensor of which the share is less than one entry."""

    least: ClassVar[int] = 0


@dataclass(frozen=True)
class Breadcrumbs:
    """θ₀ + λ Σ mask_t τ_t; per tensor of n entries the mask drops the int(γ·n) largest and keeps the next int(keep·n).

    Among equal magnitudes the lowest flat index counts as larger.

    Args:
        keep: the share of entries that is kept.
        gamma: the share of the largest entries that is dropped.
        scaling_coefficient: λ.

    Raises:
        InputError: a share outside 0..1, or both together above 1.

    Source: Model breadcrumbs, arXiv 2312.06795, with ranks over a tensor instead of over each of its rows.
    """

    keep: float = 0.15
    gamma: float = 0.006
    scaling_coefficient: float = 1.0

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.keep + self.gamma <= 1:
            raise InputError(f"breadcrumbs: keep + gamma: expected at most 1, got {self.keep} + {self.gamma}.")
        assert self._steps.granularity == self.granularity  # builds the trim, which checks its arguments

    @cached_property
    def _steps(self) -> _Crumbs:
        rule = TaskArithmetic(self.scaling_coefficient)
        return _Crumbs(rule, self.keep, scope="tensor", at_threshold="first", skip=self.gamma)

    @property
    def passes(self) -> tuple[tuple[str, ...], ...]:
        """Those of the trim."""
        return self._steps.passes

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """What the trim needs, in turn."""
        return self._steps.measure(name, base, task_vectors, earlier)

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + λ Σ mask_t τ_t."""
        return self._steps.fuse(name, base, task_vectors, statistics)
