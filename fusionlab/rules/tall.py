"""TALL: the sum of all task vectors, of which each task keeps the entries that are its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusionlab.blocks import scratch
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.errors import InputError
from fusionlab.rules.base import Granularity, StatisticsScope
from fusionlab.rules.checks import by_task

USUAL = 0.4


@dataclass(frozen=True)
class Tall:
    """θ₀ + M_t ⊙ Σ τ_k for task t, with the mask M_t = [|τ_t| > λ_t |Σ_k τ_k − τ_t|], entry by entry.

    Sums in the dtype of the blocks, in recipe order; one read of the inputs.

    Args:
        mask_threshold: λ_t, one number or one per task, from 0.2 to 0.6 in the paper's search; left out, each task's is
            chosen on validation where there is some, and 0.4 elsewhere.

    Raises:
        InputError: a threshold that is not positive.

    Source: Localizing task information for improved model merging and compression, arXiv 2405.07813, equation 4.
    """

    mask_threshold: float | Mapping[str, float] | None = None

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "tensor"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = ()
    measures_untransformed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given = USUAL if self.mask_threshold is None else self.mask_threshold
        if not all(value > 0 for value in (given.values() if isinstance(given, Mapping) else [given])):
            raise InputError(f"tall.mask_threshold: expected positive numbers, got {given!r}.")

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Nothing is measured."""
        return {}

    def unify(self, task_vectors: TaskVectors) -> Tensor:
        """Σ τ_t."""
        total = scratch.empty_like(task_vectors.stacked[0]).zero_()
        for task_vector in task_vectors.stacked:
            total += task_vector
        return total

    def masks(self, unified: Tensor, task_vectors: TaskVectors) -> Tensor:
        """Where a task's own entry is large beside the sum of the others'."""
        thresholds = self.thresholds(task_vectors.tasks)
        found = scratch.empty_like(task_vectors.stacked, torch.bool)
        with scratch.frame():
            rest, size = (scratch.empty_like(unified) for _ in range(2))
            for mask, task, task_vector in zip(found, task_vectors.tasks, task_vectors.stacked, strict=True):
                torch.sub(unified, task_vector, out=rest).abs_().mul_(thresholds[task])
                torch.gt(torch.abs(task_vector, out=size), rest, out=mask)
        return found

    def thresholds(self, tasks: tuple[str, ...]) -> dict[str, float]:
        """λ_t by task."""
        return by_task(USUAL if self.mask_threshold is None else self.mask_threshold, tasks, "tall.mask_threshold")

    def scales(self, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        """1 for every task."""
        return dict.fromkeys(tasks, 1.0)


def with_usual_threshold(rule: Any) -> Any:
    """The rule; TALL without a threshold with the usual one.

    Example:
        >>> with_usual_threshold(Tall())
        Tall(mask_threshold=0.4)
    """
    return replace(rule, mask_threshold=USUAL) if isinstance(rule, Tall) and rule.mask_threshold is None else rule
