"""DELLA: DARE that drops small entries more often than large ones, before any rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusionlab.blocks import magnitudes, scratch
from fusionlab.blocks.task_vectors import TaskVectors
from fusionlab.errors import InputError
from fusionlab.rules.base import Granularity, Rule
from fusionlab.rules.checks import of_task
from fusionlab.rules.dropping import Dropping, check_rates


@dataclass(frozen=True)
class Della(Dropping):
    """``rule`` on the task vectors with entry i kept with probability p_i and multiplied by 1/p_i, p_i by its rank.

    Within a row (of a tensor with more dimensions: all that belongs to one index of the first; a vector is one row) p
    grows evenly from density − epsilon of the smallest |τ| to density + epsilon of the largest; of equal magnitudes
    the one that comes first is smaller. Draws are those of DARE: one SplitMix64 generator per (seed, task, parameter),
    in flat order. MetaGPT's norms are those before the drop. Works on whole tensors, whose rows it ranks. A task of
    density 1 keeps all entries, as in mergekit.

    Args:
        rule: what is done with the remaining entries.
        density: the mean probability to be kept, one number or one per task.
        epsilon: how far probabilities lie from it at most.
        seed: of the generators.
        rescale: by 1/p_i (``probability``), so that every tensor keeps its L1 norm (``l1``), or ``none``.

    Raises:
        InputError: density − epsilon or density + epsilon not between 0 and 1 (but for a density of 1), an unknown
            choice, or a second transform before MetaGPT.

    Source: DELLA-Merging, arXiv 2406.11617, section 3.1 (MagPrune).
    """

    rule: Rule
    density: float | Mapping[str, float] = 0.5
    epsilon: float = 0.1
    seed: int = 0
    rescale: Literal["probability", "l1", "none"] = "probability"

    def __post_init__(self) -> None:
        for density in check_rates("della.density", self.density):
            if density != 1 and not 0 < density - abs(self.epsilon) <= density + abs(self.epsilon) < 1:
                raise InputError(
                    f"della: density - epsilon and density + epsilon must lie between 0 and 1, got density {density} "
                    f"and epsilon {self.epsilon}."
                )
        self.check("della")

    @property
    def granularity(self) -> Granularity:
        """Whole tensors."""
        return "tensor"

    def masks(self, name: str, task_vectors: TaskVectors) -> Tensor:
        """1 where an entry remains, else 0."""
        masks = scratch.empty_like(task_vectors.stacked)
        for row, task, kept in zip(masks, task_vectors.tasks, self._probabilities(task_vectors), strict=True):
            if of_task(self.density, task, "della.density") == 1:
                row.fill_(1)
                continue
            bits = self.draws(name, task, row, task_vectors.start)
            torch.ge(bits, ((0.5 - kept) * 2.0**64).long(), out=row.view(-1))
        return masks

    def unbias_(self, masks: Tensor, task_vectors: TaskVectors) -> None:
        """Times 1/p."""
        for row, kept in zip(masks, self._probabilities(task_vectors), strict=True):
            row.view(-1).div_(kept)

    def _probabilities(self, task_vectors: TaskVectors) -> Iterator[Tensor]:
        """p of every entry, float64 and flat, task by task."""
        for task, task_vector in task_vectors.items():
            density = of_task(self.density, task, "della.density")
            if density == 1:
                yield torch.ones(task_vector.numel(), dtype=torch.float64, device=task_vector.device)
                continue
            rows = magnitudes.sizes(task_vector).reshape(len(task_vector) if task_vector.dim() > 1 else 1, -1)
            ranks = torch.empty_like(rows, dtype=torch.float64)
            order = rows.argsort(dim=1, stable=True)
            steps = torch.linspace(-1.0, 1.0, rows.shape[1], dtype=torch.float64, device=rows.device)
            if rows.shape[1] == 1:
                steps.zero_()
            ranks.scatter_(1, order, steps.expand_as(rows))
            yield ranks.mul_(self.epsilon).add_(density).view(-1)
