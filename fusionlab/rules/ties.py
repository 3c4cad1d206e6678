"""TIES: trim every task vector, elect signs, average what agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from torch import Tensor

from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.rules.base import Granularity, StatisticsScope
from fusionlab.rules.disjoint_mean import DisjointMean
from fusionlab.rules.trim import Trim


@dataclass(frozen=True)
class Ties:
    """θ₀ + λ · disjoint mean of the trimmed task vectors: :class:`Trim` before :class:`DisjointMean`.

    Args:
        density: the share of entries of each task vector to keep, one number or one per task.
        scaling_coefficient: λ.
        scope: rank entries, and settle votes that cancel out, over the ``model`` or over each ``tensor``.
        election: elect signs by ``mass`` or by ``count``.

    Raises:
        InputError: a density outside 0..1, or an unknown choice.

    Source: TIES-Merging, arXiv 2306.01708, algorithm 1.
    """

    density: float | Mapping[str, float] = 0.2
    scaling_coefficient: float = 1.0
    scope: Literal["model", "tensor"] = "model"
    election: Literal["mass", "count"] = "mass"

    granularity: ClassVar[Granularity] = "elementwise"
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        assert self._steps.rule.granularity == self.granularity  # builds both parts, which check their arguments

    @cached_property
    def _steps(self) -> Trim:
        mean = DisjointMean(self.scaling_coefficient, self.election, scope=self.scope)
        return Trim(mean, self.density, self.scope)

    @property
    def statistics_scope(self) -> StatisticsScope:
        """What entries are ranked over."""
        return self.scope

    @property
    def passes(self) -> tuple[tuple[str, ...], ...]:
        """Two histograms, and the balance of the elected signs."""
        return self._steps.passes

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """What the trim and the election need, in turn."""
        return self._steps.measure(name, base, task_vectors, earlier)

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + λ · disjoint mean."""
        return self._steps.fuse(name, base, task_vectors, statistics)
