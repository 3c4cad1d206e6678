"""Consensus: task arithmetic on the entries that more than one task needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionlab.blocks import scratch
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError, name_list
from fusionlab.rules.base import Granularity, StatisticsScope
from fusionlab.rules.checks import by_task


@dataclass(frozen=True)
class Consensus:
    """θ₀ + λ [Σ_t M_t >= min_tasks] Σ τ_t with the masks M_t = [|τ_t| > λ_t |Σ_k τ_k − τ_t|], entry by entry.

    Entries that no task or one alone needs, as their masks say, are left to the base. Masks and sums in the dtype of
    the blocks, float32 or wider, in recipe order; one read of the inputs. Without a search of the λ_t by task, as the
    paper makes it, ``mask_threshold`` stands for all.

    Args:
        scaling_coefficient: λ; to be chosen on validation.
        mask_threshold: λ_t, one number or one per task; from 0.2 to 0.6 in the paper's search.
        min_tasks: how many masks must agree; 2 is the paper's.

    Raises:
        InputError: a threshold that is not positive, or (when fusing) fewer tasks than must agree.

    Source: Localizing task information for improved model merging and compression, arXiv 2405.07813, section 4.
    """

    scaling_coefficient: float = 0.3
    mask_threshold: float | Mapping[str, float] = 0.4
    min_tasks: int = 2

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = ()
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        values = self.mask_threshold.values() if isinstance(self.mask_threshold, Mapping) else [self.mask_threshold]
        if not all(value > 0 for value in values):
            raise InputError(f"consensus.mask_threshold: expected positive numbers, got {self.mask_threshold!r}.")
        if self.min_tasks < 1:
            raise InputError(f"consensus.min_tasks: expected at least 1, got {self.min_tasks}.")

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Nothing is measured."""
        return {}

    def fuse(self, name: str, base: Tensor, task_vectors: TaskVectors, statistics: Statistics) -> Tensor:
        """θ₀ + λ times the sum where enough masks agree."""
        tasks = task_vectors.tasks
        if len(tasks) < self.min_tasks:
            raise InputError(
                f"consensus keeps what at least {self.min_tasks} tasks need, got {len(tasks)}: {name_list(tasks)}; "
                "give more tasks, or use task_arithmetic."
            )
        thresholds = by_task(self.mask_threshold, tasks, "consensus.mask_threshold")
        total = scratch.empty_like(base).zero_()
        for task_vector in task_vectors.stacked:
            total += task_vector
        with scratch.frame():
            rest, size, agreeing = (scratch.empty_like(base) for _ in range(3))
            agreeing.zero_()
            for task, task_vector in zip(tasks, task_vectors.stacked, strict=True):
                torch.sub(total, task_vector, out=rest).abs_().mul_(thresholds[task])
                torch.abs(task_vector, out=size)
                agreeing += torch.gt(size, rest, out=size)
            total *= torch.ge(agreeing, self.min_tasks, out=agreeing)
        return total.mul_(self.scaling_coefficient).add_(base)
