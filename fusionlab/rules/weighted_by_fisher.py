"""Fine-tuned models weighted entry by entry by how much each entry decides the predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.rules.base import Granularity, StatisticsScope
from fusionlab.rules.carried import UNTOLD, check_carried, check_known, hash_of
from fusionlab.rules.checks import check_range
from fusionlab.rules.matrix_rule import mean

Fishers = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class WeightedByFisher:
    """θ₀ + Σ F̂_t τ_t / Σ F̂_t, entry by entry, with F̂_t = F_t + floor and F_t the diagonal of task t's Fisher matrix.

    Computed about the mean task vector, in float64. One task gives its own model; equal F_t give the average, and so do
    entries whose F_t are far below the floor.

    Args:
        floor: added to every F_t.
        statistics: the hash of ``fishers``, which stands for them in configurations.
        fishers: F_t by name on disk and task, not negative, in the shape of the tensor; given by the search fisher.

    Raises:
        InputError: a floor that is not positive, or (when fusing) no statistics, or those of other tasks or names.

    Source: Merging models with Fisher-weighted averaging, arXiv 2111.09832, equation 5.
    """

    floor: float = 1e-6
    statistics: str = ""
    fishers: Fishers = field(default_factory=dict, repr=False, compare=False, metadata=UNTOLD)

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = ()
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("floor", self.floor, 0, float("inf"), open_low=True)

    @classmethod
    def of(cls, floor: float, fishers: Fishers) -> WeightedByFisher:
        """The rule with these statistics."""
        tensors = {f"{name} {task}": fisher for name, of in fishers.items() for task, fisher in of.items()}
        return cls(floor, hash_of(tensors), fishers)

    @property
    def is_complete(self) -> bool:
        """Whether it has its statistics."""
        return bool(self.fishers)

    def check(self, tasks: Sequence[str], names: Sequence[str]) -> None:
        """Raise unless it has statistics of these tasks, and of these names only.

        Raises:
            InputError: as when fusing.
        """
        check_carried("weighted_by_fisher", "fisher", self.fishers, tasks)
        check_known("weighted_by_fisher", self.fishers, names)

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Nothing is measured."""
        return {}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + the weighted mean."""
        names = statistics.names or tuple(self.fishers)
        statistics.once("weighted_by_fisher", lambda: self.check(task_vectors.tasks, names))
        fishers = self._flat.get(name)
        if fishers is None:
            return mean(task_vectors).add_(base)
        block = slice(task_vectors.start, task_vectors.start + base.numel())
        middle = task_vectors.stacked.double().mean(0).view(-1)
        total, rest = torch.zeros_like(middle), torch.zeros_like(middle)
        for task, task_vector in task_vectors.items():
            weight = fishers[task][block].to(middle.device, torch.float64) + self.floor
            total += weight
            rest += weight * (task_vector.reshape(-1) - middle)
        return middle.addcdiv_(rest, total).view(base.shape).add_(base).to(base.dtype)

    @cached_property
    def _flat(self) -> dict[str, dict[str, Tensor]]:
        return {name: {task: each.reshape(-1) for task, each in of.items()} for name, of in self.fishers.items()}
