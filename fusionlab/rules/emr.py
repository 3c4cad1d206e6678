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
                found[f"masked_sum/{task}"] = partial_sums(values.copy_(unified).abs_().mul_(mask))
        return found

    def unify(self, task_vectors: TaskVectors) -> Tensor:
        """The largest entry of the elected sign; 0 where all are."""
        total = scratch.empty_like(task_vectors.stacked[0]).zero_()
        for task_vector in task_vectors.stacked:
            total += task_vector
        largest, smallest = (scratch.empty_like(total) for _ in range(2))
        torch.amax(task_vectors.stacked, 0, out=largest).clamp_(min=0)
        torch.amin(task_vectors.stacked, 0, out=smallest).clamp_(max=0)
        return torch.where(total > 0, largest, smallest)

    def masks(self, unified: Tensor, task_vectors: TaskVectors) -> Tensor:
        """Where τ_t and u have one sign."""
        return torch.where(unified > 0, task_vectors.stacked > 0, task_vectors.stacked < 0)

    def scales(self, tasks: tuple[str, ...], statistics: Statistics) -> dict[str, float]:
        """Σ |τ_t| / Σ |M_t u|."""
        kept = {task: statistics.sum(f"masked_sum/{task}") for task in tasks}
        return {task: statistics.sum(f"absolute_sum/{task}") / kept[task] if kept[task] else 0.0 for task in tasks}
