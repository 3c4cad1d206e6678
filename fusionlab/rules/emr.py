"""EMR: elect one vector, mask it and rescale it by task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fusionlab.blocks import scratch
from fusionlab.blocks.sums import partial_sums
from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.rules.base import Granularity, StatisticsScope


@dataclass(frozen=True)
class Emr:
    """θ₀ + s_t M_t ⊙ u for task t, with u = γ · max |τ_k| over the τ_k of sign γ, the sign of Σ τ_k, entry by entry.

    M_t is 1 where τ_t has the sign of u; s_t = Σ |τ_t| / Σ |M_t u| over all fused entries of the model, 0 where nothing
    of the task is left. A sum of zero counts as minus. Sums over entries in float64, the rest in the dtype of the
    blocks; two reads of the inputs. The official code takes means of each tensor's means for s_t, not these totals.

    Source: EMR-Merging, arXiv 2405.17461, equations 2 to 5.
    """

    granularity: ClassVar[Granularity] = "elementwise"
    statistics_scope: ClassVar[StatisticsScope] = "model"
    passes: ClassVar[tuple[tuple[str, ...], ...]] = (("absolute_sum", "masked_sum"),)
    measures_untransformed: ClassVar[bool] = False

    def measure(self, name: str, base: Tensor, task_vectors: TaskVectors, earlier: Statistics) -> dict[str, Tensor]:
        """Σ |τ_t| and Σ |M_t u| by task."""
        found = {}
        with scratch.frame():
            unified = self.unify(task_vectors)
            masks = self.masks(unified, task_vectors)
            values = scratch.empty_like(unified, torch.float64)
            for task, task_vector, mask in zip(task_vectors.tasks, task_vectors.stacked, masks, strict=True):
                found[f"absolute_sum/{task}"] = partial_sums(values.copy_(task_vector).abs_())
                values.copy_(unified).abs_().masked_fill_(torch.logical_not(mask, out=mask), 0)
                found[f"masked_sum/{task}"] = partial_sums(values)
        return found

    def unify(self, task_vectors: TaskVectors) -> Tensor:
        """The largest entry of the elected sign; 0 where all are."""
        unified = scratch.empty_like(task_vectors.stacked[0])
        with scratch.frame():
            total, smallest = (scratch.empty_like(unified) for _ in range(2))
            positive = scratch.empty_like(unified, torch.bool)
            total.zero_()
            for task_vector in task_vectors.stacked:
                total += task_vector
            torch.amax(task_vectors.stacked, 0, out=unified).clamp_(min=0)
            torch.amin(task_vectors.stacked, 0, out=smallest).clamp_(max=0)
            torch.where(torch.gt(total, 0, out=positive), unified, smallest, out=unified)
        return unified

    def masks(self, unified: Tensor, task_vectors: TaskVectors) -> Tensor:
        """Where τ_t and u have one sign."""
        found = scratch.empty_like(task_vectors.stacked, torch.bool)
        with scratch.frame():
            positive, negative = (scratch.empty_like(unified, torch.bool) for _ in range(2))
            torch.gt(unified, 0, out=positive)
            for mask, task_vector in zip(found, task_vectors.stacked, strict=True):
                torch.gt(task_vector, 0, out=mask)
                torch.where(positive, mask, torch.lt(task_vector, 0, out=negative), out=mask)
        return found

    def scales(self, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        """Σ |τ_t| / Σ |M_t u|."""
        kept = {task: statistics.sum(f"masked_sum/{task}") for task in tasks}
        return {task: statistics.sum(f"absolute_sum/{task}") / kept[task] if kept[task] else 0.0 for task in tasks}
