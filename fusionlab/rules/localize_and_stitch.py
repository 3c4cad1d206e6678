"""Localize-and-Stitch without data: the largest entries of every task, averaged where they meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusionlab.blocks import scratch
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.rules.base import Granularity, StatisticsScope
from fusionlab.rules.trim import Trim


@dataclass(frozen=True)
class LocalizeAndStitch:
    """θ₀ + the mean, entry by entry, over the tasks that kept it, of the largest entries of each task vector.

    Each task keeps the entries that are at least as large as the (k+1)-th largest, k = int(density·n) of its n entries,
    as TIES does; zeros are never kept. There is no coefficient. Localization by data, which trains the masks, is not
    done here. Sums in the dtype of the blocks, float32 or wider; three reads of the inputs.

    Args:
        density: the share of entries of each task vector to keep, one number or one per task.
        scope: rank entries over the ``model`` or over each ``tensor``.

    Raises:
        InputError: a density outside 0..1, or an unknown choice.

    Source: Localize-and-Stitch, arXiv 2408.13656, section 3.3 (dataless) and 3.2.
    """

    density: float | Mapping[str, float] = 0.1
    scope: Literal["model", "tensor"] = "model"

    granularity: ClassVar[Granularity] = "elementwise"
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        assert self._steps.granularity == self.granularity  # builds the trim, which checks its arguments

    @cached_property
    def _steps(self) -> Trim:
        return Trim(_Stitched(), self.density, self.scope)

    @property
    def statistics_scope(self) -> StatisticsScope:
        """What entries are ranked over."""
        return self.scope

    @property
    def passes(self) -> tuple[tuple[str, ...], ...]:
        """Those of the trim."""
        return self._steps.passes

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """What the trim needs, in turn."""
        return self._steps.measure(name, base, task_vectors, earlier)

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + the mean of what was kept."""
        return self._steps.fuse(name, base, task_vectors, statistics)


@dataclass(frozen=True)
class _Stitched:
    """θ₀ + Σ τ_t / the number of τ_t that are not zero, entry by entry."""

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = ()
    measures_untransformed: ClassVar[bool] = False

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Nothing is measured."""
        return {}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + mean."""
        total = scratch.empty_like(base).zero_()
        with scratch.frame():
            count, kept = scratch.empty_like(base).zero_(), scratch.empty_like(base)
            for task_vector in task_vectors.stacked:
                total += task_vector
                count += torch.ne(task_vector, 0, out=kept)
            total.div_(count.clamp_(min=1))
        return total.add_(base)
